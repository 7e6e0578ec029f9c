"""``python -m vlm_attn``: the command line, also for ``accelerate launch -m vlm_attn``."""

from vlm_attn.cli import main

if __name__ == "__main__":
    main()
