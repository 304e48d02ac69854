"""Trains or evaluates ResMLP data-parallel: one process a visible GPU, or -nprocs N on CPU.

python main_multi_gpu.py -cfg=./configs/resmlp_24_224.yaml -dataset=imagenet2012 \\
    -batch_size=256 -data_path=/dataset/imagenet [-eval -pretrained=FILE] [-amp]
python -m paddle.distributed.launch --nnodes 2 --master HOST:PORT main_multi_gpu.py -cfg=...
"""

from __future__ import annotations

from cli.errors import run_as_script
from config import get_arguments, resolve_config
from launch import launch


def main() -> int:
    config = resolve_config(get_arguments(description=__doc__))
    return launch(config, config.DIST.NPROCS)


if __name__ == "__main__":
    run_as_script(main)
