"""``python -m xai_edit`` is ``xai-edit``."""

from xai_edit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
