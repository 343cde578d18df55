"""``python -m moe_ext`` is ``moe-ext``."""

from moe_ext.cli import main

if __name__ == "__main__":
    main()
