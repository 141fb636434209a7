"""The command line: `python -m trainer train | evaluate | generate`."""

import sys

from trainer.config import ConfigError, parse_options


def main() -> int:
    """Return 0, 1 if the store failed, 2 if the options do not fit, 130 if interrupted."""
    failures: tuple[type[Exception], ...] = (ConfigError,)
    try:
        command, options = parse_options()

        # Only now, so that --help does not wait for torch.
        import ckptstore
        from trainer import loop

        failures = (ConfigError, ckptstore.CheckpointError)
        {"train": loop.train, "evaluate": loop.evaluate, "generate": loop.generate}[command](options)
    except failures as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
