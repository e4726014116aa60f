# SPDX-License-Identifier: Apache-2.0
"""The commands, and how errors and exit codes come out of them.

Exit codes: 0 all is well; 1 the answer is no (a bound missed, nothing serves the request);
2 the call was wrong (an unknown name, a file that cannot be written, a package missing).
"""

import sys
from typing import Annotated

import typer

from fastkv import __version__
from fastkv.cli import calibrate, demo, doctor, plan, select, serve_pair, warmup
from fastkv.cli import eval as evaluation
from fastkv.errors import FastKVError, SelectionError

app = typer.Typer(
    name="fastkv",
    help="The KV-cache layer that attention backends import.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastkv {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The KV-cache layer that attention backends import."""


app.command()(calibrate.calibrate)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command("eval")(evaluation.evaluate)
app.command()(plan.plan)
app.command()(select.select)
app.command("serve-pair")(serve_pair.serve_pair)
app.command()(warmup.warmup)


def main() -> None:
    """Run the command line; fastkv's own errors end as one line on standard error."""
    try:
        app()
    except FastKVError as error:
        print(_named(str(error)), file=sys.stderr)
        sys.exit(1 if isinstance(error, SelectionError) else 2)
    except OSError as error:
        print(_named(str(error)), file=sys.stderr)
        sys.exit(2)


def _named(text: str) -> str:
    """An error with the program's name in front, once: a command's own errors begin with it."""
    return text if text.startswith("fastkv ") else f"fastkv: {text}"
