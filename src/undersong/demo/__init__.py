"""What `undersong demo` runs: real text continued, a model trained, its way through a Hub, and a report of it all."""

__all__ = ["run"]


def run(output="undersong-demo", fast=False):
    """Runs every stage and writes `report.html` and `demo.json`.

    Args:
        output: folder for the two files; made if missing.
        fast: a reduced run for checks: fewer prompts, tokens and epochs.

    Returns:
        Path of the report.

    Raises:
        WheelError: the language model could not be fetched (`undersong.data`).
        ImportError: an optional package is missing; `pip install 'undersong[demo]'` brings it.
    """
    from . import runner

    return runner.run(output, fast)
