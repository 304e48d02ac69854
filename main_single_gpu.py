"""Trains or evaluates ResMLP in one process, on a GPU where there is one, else on CPU.

python main_single_gpu.py -cfg=./configs/resmlp_24_224.yaml -dataset=imagenet2012 \\
    -batch_size=256 -data_path=/dataset/imagenet [-eval -pretrained=FILE] [-amp]
"""

from __future__ import annotations

from cli.errors import ConfigError, run_as_script
from config import get_arguments, resolve_config
from launch import launch


def main() -> int:
    config = resolve_config(get_arguments(description=__doc__))
    if config.DIST.NPROCS > 1:
        raise ConfigError(f"-nprocs {config.DIST.NPROCS}: only main_multi_gpu.py runs several")
    return launch(config, 1)


if __name__ == "__main__":
    run_as_script(main)
