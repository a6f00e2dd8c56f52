"""``python -m d2kit.config [KEY ...]`` explains keys; without any it prints docs/config.md."""

import sys

from d2kit.config._docs import explain, markdown


def main(names: list[str]) -> int:
    """Print what was asked for.

    Args:
        names: full key names.

    Returns:
        Exit code: 0, or 2 for an unknown key.
    """
    if not names:
        sys.stdout.write(markdown())
        return 0
    for name in names:
        try:
            print(explain(name))
        except KeyError as error:
            print(error.args[0], file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
