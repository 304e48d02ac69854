"""The official archives of CIFAR and Flowers-102, made in small."""

from __future__ import annotations

import gzip
import io
import tarfile

import numpy as np
from PIL import Image


def tar_of(files):
    """The bytes of a tar with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path, files):
    path.write_bytes(gzip.compress(tar_of(files)))
    return str(path)


def records(count, classes, head, seed):
    """Images [n, 32, 32, 3], their labels, and CIFAR's records of them."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, [count, 32, 32, 3], dtype=np.uint8)
    labels = rng.integers(0, classes, count, dtype=np.uint8)
    heads = np.stack([labels // 2, labels][2 - head :], 1)  # CIFAR-100: the coarse label first
    planes = images.transpose(0, 3, 1, 2).reshape(count, -1)
    return images, labels, np.concatenate([heads, planes], 1).tobytes()


def cifar10(path, **changes):
    parts = [records(4, 10, 1, seed) for seed in range(6)]
    names = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    files = {name: part[2] for name, part in zip(names, parts)}
    classes = [f"class{n}" for n in range(10)]
    files["batches.meta.txt"] = ("\n".join(classes) + "\n\n").encode()
    files = {f"cifar-10-batches-bin/{n}": d for n, d in {**files, **changes}.items() if d}
    return write_tar(path, files), parts, classes


def cifar100(path):
    parts = [records(20, 100, 2, seed) for seed in range(2)]
    classes = [f"fine_{n:02d}" for n in range(100)]
    files = {"train.bin": parts[0][2], "test.bin": parts[1][2]}
    files["fine_label_names.txt"] = "\n".join(classes).encode()
    files["coarse_label_names.txt"] = b"animals\nthings\n"
    return write_tar(path, {f"cifar-100-binary/{n}": d for n, d in files.items()}), parts, classes


def write_mat(path, matrices):
    from scipy.io import savemat  # which CIFAR does not need

    savemat(path, {name: np.array(values, "uint16") for name, values in matrices.items()})


def flowers102(folder):
    images = {}
    for number in range(1, 10):
        file = io.BytesIO()
        Image.fromarray(np.full([8, 9, 3], 20 * number, "uint8")).save(file, "JPEG")
        images[f"jpg/image_{number:05d}.jpg"] = file.getvalue()
    write_mat(folder / "imagelabels.mat", {"labels": [3, 1, 2] * 3})
    sets = {"trnid": [9, 2], "valid": [1, 6], "tstid": [8, 3, 4, 5, 7]}
    write_mat(folder / "setid.mat", sets)
    return write_tar(folder / "102flowers.tgz", images), images
