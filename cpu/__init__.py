"""How a CPU is made fast: the process, the block's operators, Pillow's pixels."""
