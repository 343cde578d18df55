"""``python -m moe_ext`` is ``moe-ext``."""

from moe_ext.commands.main import main

if __name__ == "__main__":
    main()
