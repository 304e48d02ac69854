"""The PyTorch side of tools/compare_deit.py: facebookresearch/deit's main.py on a CPU, as it is.

Run by the other environment's Python: ``deit_main.py FOLDER OUTPUTS arguments of DeiT's main.py``.
What is put in the way is what a CPU, recent timm and Pillow, and a small ResMLP need.
"""

import argparse
import sys


def run(folder: str, outputs: int) -> None:
    """Runs main.py of a clone of DeiT, for a head of so many outputs."""
    sys.path[0] = folder  # instead of tools/
    import timm.data.transforms
    import torch
    from PIL import Image, ImageOps

    timm.data.transforms._pil_interp = None  # imported by name, and not used here
    torch.cuda.synchronize = lambda: None
    torch.set_num_threads(1)
    keep = ImageOps.posterize  # Pillow 13 refuses to keep no bit
    ImageOps.posterize = lambda im, bits: keep(im, bits) if bits else Image.new(im.mode, im.size)
    import main  # DeiT's
    from resmlp_models import resmlp_models
    from timm.models import register_model

    args = argparse.ArgumentParser(parents=[main.get_args_parser()]).parse_args()

    class ResMLP(resmlp_models):
        pos_embed = torch.zeros(1, 16, 1)  # main.py takes positions for granted

        def forward(self, x):
            x = super().forward(x)  # the paper distils with one head
            return (x, x) if self.training and args.distillation_type != "none" else x

    @register_model
    def resmlp_tiny(num_classes, drop_path_rate=0.0, **_):
        shape = dict(img_size=56, patch_size=14, embed_dim=128, depth=4, init_scale=0.1)
        return ResMLP(num_classes=num_classes, drop_path_rate=drop_path_rate, **shape)

    def load(path, read=torch.load, **options):
        checkpoint = read(path, weights_only=False, **options)  # it has main.py's arguments too
        if args.finetune:
            checkpoint["model"]["pos_embed"] = ResMLP.pos_embed
        return checkpoint

    torch.load, build_dataset = load, main.build_dataset
    main.build_dataset = lambda **options: (build_dataset(**options)[0], outputs)  # not 1,000
    main.get_state_dict = lambda ema: None  # it would save an EMA that is off
    main.main(args)


if __name__ == "__main__":
    run(sys.argv.pop(1), int(sys.argv.pop(1)))
