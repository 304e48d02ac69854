"""Names of the classes of data, weights and teachers; what to do where two meet. (No Paddle.)"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches

from cli.errors import DataError
from loading import archives
from loading.files import class_folders, evaluation_folder, find_classes, one_name, read_list
from loading.imagenet import wordnet_ids
from loading.images import open_regular, reason_of
from storage.files import printable


@dataclass(frozen=True)
class ClassNames:
    """The names of classes by label; false where nobody knows them.

    `source` is the file or folder that says so, for messages. `folders` are the class folders, if
    there are any: they tell which class it is, even where `names` are others, for people.
    """

    names: tuple[str, ...] = ()
    source: str = ""
    folders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def labels_in(
        self, other: ClassNames, advice: str = "", subset: bool = False
    ) -> tuple[list[int] | None, str]:
        """Each label's label in ``other``, and a line for the log; None and "" where both are equal
        (NFC and NFD are one name), or one is unknown. DataError, ended by ``advice``, for other
        names; with ``subset`` these may be some of the other's classes only.
        """
        if difference := self.difference(other, subset):
            raise DataError(difference + (advice and f"; {advice}"))
        mine, theirs = self._comparable(other, subset)
        if mine == theirs:
            return None, ""
        label_of = {name: label for label, name in enumerate(theirs)}
        labels = [label_of[name] for name in mine]
        if labels == sorted(labels):  # some of the classes, in the same order
            return labels, ""
        label = next(i for i, there in enumerate(labels) if there != i)
        return labels, (
            f"warning: {self.source}: the classes are in another order than in {other.source} "
            f"(label {label} is {printable(mine[label])!r}, not {printable(theirs[label])!r}): "
            "their labels there are used"
        )

    def difference(self, other: ClassNames, subset: bool = False) -> str:
        """The first difference from another set, in any order; empty: none, or one is unknown."""
        mine, theirs = self._comparable(other, subset)
        if _agree(mine, theirs, subset):
            return ""
        one, two = set(mine), set(theirs)
        here = [(label, name) for label, name in enumerate(mine) if name not in two]
        there = [(label, name) for label, name in enumerate(theirs) if name not in one]
        if not here and (subset or not there):
            (twice, _), *_ = Counter(mine).most_common(1)
            return f"{self.source}: {printable(twice)!r} is the name of two classes"
        if not here:
            label, name = there[0]
            missing = f"{len(there)} classes of {other.source} are missing, such as "
            return f"{self.source}: {missing}{printable(name)!r} (label {label} there)"
        label, name = here[0]
        others = [name for _, name in there] or theirs
        near = (get_close_matches(name, others, 1) or others)[0]
        return (
            f"{self.source}: {len(here)} of {len(mine)} classes are not among those of "
            f"{other.source}, such as {printable(name)!r}"
            + (f" (label {label})" * (not subset))
            + f"; label {theirs.index(near)} there is {printable(near)!r}"
        )

    def _comparable(self, other: ClassNames, subset: bool) -> tuple[list[str], list[str]]:
        """The two lists to compare; two empty ones where there is nothing to."""
        if not self or not other:
            return [], []
        pairs = [(self.folders, other.folders)]
        if not all(pairs[0]):  # a file of names may have the one or the other
            mine, theirs = self.names, other.names
            if len(mine) == len(theirs) and (mine == wordnet_ids()) != (theirs == wordnet_ids()):
                return [], []  # these ids have many names for people
            pairs = [(mine, theirs), (self.folders, theirs), (mine, other.folders)]
        pairs = [tuple([one_name(n) for n in names] for names in pair) for pair in pairs]
        return next((p for p in pairs if all(p) and _agree(*p, subset)), pairs[0])

    def record(self) -> dict:
        """What a checkpoint, weight file or export keeps, of lists and texts; see `of_record`."""
        return {"names": list(self.names), "folders": list(self.folders)}

    @classmethod
    def of_record(cls, record: object, source: str) -> ClassNames:
        """The set that `record` (or its JSON) is of; unknown where it is anything else."""
        with suppress(ValueError, RecursionError):
            record = json.loads(record) if isinstance(record, str) else record
        if type(record) is not dict:
            return cls()
        names, folders = record.get("names", []), record.get("folders", [])
        texts = all(type(x) is list and {*map(type, x)} <= {str} for x in (names, folders))
        if not texts or len(folders) not in (0, len(names)):
            return cls()
        return cls(tuple(names), source, tuple(folders))

    @classmethod
    def beside(cls, weights: str | os.PathLike) -> ClassNames:
        """The ``classes.txt`` beside a weight file; unknown if there is none that can be read."""
        path = os.path.join(os.path.dirname(weights), "classes.txt")
        with suppress(DataError):
            return cls(tuple(read_class_names(path)), path)
        return cls()


UNKNOWN = ClassNames()


def _agree(mine: list[str], theirs: list[str], subset: bool) -> bool:
    """Whether every class of the one is found, once, in the other."""
    once = len(set(mine)) == len(mine) and (subset or len(mine) == len(theirs))
    return mine == theirs or (once and set(mine) <= set(theirs))


def read_class_names(path: str, num_classes: int | str = "auto") -> list[str]:
    """The names in a text file, line i of label i. DataError if it is unreadable, lacks a name in a
    line, or has not `num_classes` lines.
    """
    try:
        with open_regular(path, "r", encoding="utf-8-sig") as file:
            names = [line.strip() for line in file.read().rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {reason_of(error)}; expected one class name a line") from None
    if "" in names:
        line = names.index("") + 1
        raise DataError(f"{path}:{line}: no name; expected one class name a line")
    if num_classes not in ("auto", len(names)):
        raise DataError(f"{path}: {len(names)} names but MODEL.NUM_CLASSES is {num_classes}")
    return names


def data_classes(config) -> ClassNames:
    """The classes of a config's data, by its labels: DATA.CLASS_NAMES, or ``classes.txt``, or the
    folders of an `imagefolder` tree. DataError: unreadable, or not MODEL.NUM_CLASSES names.
    """
    given, root = _given_names(config), config.DATA.DATA_PATH
    if config.DATA.DATASET != "imagefolder" or not archives.is_folder(root):
        return given
    folders = tuple(find_classes(root))
    return ClassNames(given.names or folders, root, folders)


def _given_names(config) -> ClassNames:
    path = config.DATA.CLASS_NAMES or os.path.join(config.DATA.DATA_PATH, "classes.txt")
    if not config.DATA.CLASS_NAMES and not os.path.lexists(path):
        return UNKNOWN
    return ClassNames(tuple(read_class_names(path, config.MODEL.NUM_CLASSES)), path)


def run_classes(config, weights: ClassNames = UNKNOWN) -> tuple[ClassNames, list[int] | None, str]:
    """The classes of a run by the labels of its model, which are those of the weights.

    Returns them (of an `imagefolder` tree with all folders), and what `ClassNames.labels_in` does.
    Folders to evaluate on may be some of the classes; 1,000 unknown ones are ImageNet's, by WordNet
    id or by number, as in ImageNet-V2. DataError as `data_classes`, or where data have others.
    """
    advice = "name them as they were; other classes take a new run, with -pretrained"
    if config.EVAL:
        advice = "evaluate weights of these classes, or call these as the weights do"
    if config.EVAL and config.DATA.DATASET == "imagefolder":
        folder, given = evaluation_folder(config.DATA.DATA_PATH), _given_names(config).names
        names = tuple(class_folders(folder)) if archives.is_folder(folder) else ()
        folders, known = ClassNames(names, folder, names), []
        count, ids = config.MODEL.NUM_CLASSES, wordnet_ids()
        if names and len(weights) == count and weights.names != ids:
            known = [weights]
        elif names and count == len(ids):
            by_number = {int(name): name for name in names if name.isdecimal()}  # maybe 0007
            numbers = tuple(by_number.get(label, str(label)) for label in range(count))
            known = [ClassNames(x, "ImageNet", x) for x in (ids, numbers)]
        for classes in known:
            if not folders.difference(classes, subset=True):
                among = ClassNames(given or classes.names, folder, classes.folders or classes.names)
                return among, *folders.labels_in(classes, subset=True)
        if known and (not given or weights.folders or given != weights.names):
            folders.labels_in(known[0], advice, subset=True)  # raises
    own = data_classes(config)
    labels, line = own.labels_in(weights, advice)
    if labels:
        names, folders = (
            tuple(name for _, name in sorted(zip(labels, names)))
            for names in (own.names, own.folders)
        )
        own = ClassNames(names, own.source, folders)
    elif not own and len(weights) == config.MODEL.NUM_CLASSES:
        own = weights
    return own, labels, line


def with_num_classes(config, weights: ClassNames = UNKNOWN):
    """The config, frozen, with a number where MODEL.NUM_CLASSES is ``auto``.

    It is the number of classes of ``weights``, else of the data, else the largest label of the
    training list (or the validation list) and one more. DataError if data cannot be read.
    """
    root, data = config.DATA.DATA_PATH, config.DATA
    if config.MODEL.NUM_CLASSES != "auto":
        return config
    if not weights and not archives.is_folder(root):
        raise DataError(
            f"{root}: no such data folder, and MODEL.NUM_CLASSES auto counts the classes there; "
            "set it with `-data_path` (tools: -opts DATA.DATA_PATH DIR), or set the number"
        )
    count = len(weights or data_classes(config))
    if not count:
        lists = [os.path.join(root, name) for name in (data.TRAIN_LIST, data.VAL_LIST)]
        path = next(filter(os.path.isfile, lists), lists[0])
        count = max(read_list(path, root, 10**9, data.ALLOW_OUTSIDE_PATHS).labels) + 1
    config = type(config)({**config, "MODEL": {**config.MODEL, "NUM_CLASSES": count}})
    config.freeze()
    return config
