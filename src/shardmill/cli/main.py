"""The command line as a whole: its commands, and what becomes of their errors.

Exit status: 0 done, 1 the operation failed, 2 the call was wrong; a closed pipe ends the process as SIGPIPE does.
No error ever shows a Python traceback, except that of a user's own transform.
"""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

from shardmill import __version__
from shardmill.cli import bench, caching, jobs, node, objects, serve, top, transfer, transforms
from shardmill.cli.output import say
from shardmill.config import ConfigError
from shardmill.core.errors import (
    BadRequest,
    BucketNotFound,
    MemberNotFound,
    ObjectNotFound,
    ShardmillError,
    TransformNotFound,
    Unauthenticated,
)
from shardmill.shards.tar import TarError
from shardmill.testing.node import NodeFailed

INTERRUPTED = 130  # as a shell counts SIGINT
HINTS: dict[type[ShardmillError], str] = {
    BucketNotFound: "`shardmill ls` shows the buckets",
    MemberNotFound: "`shardmill ls --members URI` shows what is there",
    ObjectNotFound: "`shardmill ls BUCKET` shows what is there",
    TransformNotFound: "`shardmill transform ls` shows the registered ones",
    Unauthenticated: "set SHARDMILL_TOKEN",
}
"""What to do next, where the message does not say it."""

app = typer.Typer(
    name="shardmill",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="An object store for sharded data in which a transformed shard is a URL.",
)
app.command()(serve.serve)
if importlib.util.find_spec("shardmill.cli.demo"):
    app.command()(importlib.import_module("shardmill.cli.demo").demo)
app.command("ls")(objects.list_objects)
app.command()(transfer.get)
app.command()(transfer.put)
app.command()(transfer.cp)
app.command()(caching.prefetch)
app.command()(caching.evict)
app.command()(objects.stat)
app.command()(objects.rm)
app.command()(objects.mb)
app.command()(objects.rb)
app.add_typer(transforms.app, name="transform")
app.add_typer(jobs.app, name="job")
app.command()(bench.bench)
app.command()(node.status)
app.command()(top.top)
app.command()(node.doctor)
app.command()(node.config)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"shardmill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="The node; default: SHARDMILL_ENDPOINT, else localhost:51080.")
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if endpoint is not None:
        os.environ["SHARDMILL_ENDPOINT"] = endpoint


def main() -> NoReturn:
    """Entry point of the script."""
    status = run(sys.argv[1:])
    if status == INTERRUPTED and threading.active_count() > 1:
        # Transfers go on in threads that an exit would wait for; whatever they leave is good for the next try.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit status."""
    try:
        status = get_command(app).main(list(arguments), prog_name="shardmill", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        return _end_as_sigpipe()
    except SystemExit as end:
        # typer answers a closed pipe by itself, with status 1.
        if isinstance(end.__context__, BrokenPipeError):
            return _end_as_sigpipe()
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    except (BadRequest, ConfigError) as error:
        say(f"shardmill: {error}")
        return 2
    # OSError has those of the client too: nobody answers, a body was cut.
    except (ShardmillError, NodeFailed, TarError, ImportError, OSError) as error:
        explain(error)
        return 1
    except Exception as error:
        return _end_of_call(error)
    return status if isinstance(status, int) else 0


def explain(error: Exception, about: str = "") -> None:
    """Say an error on standard error: one line, and the user's own traceback if there is one."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ShardmillError):
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    hint = next((text for kind, text in HINTS.items() if isinstance(error, kind)), "")
    say(f"shardmill: {about}{message}" + (f" ({hint})" if hint and "shardmill " not in message else ""))
    if isinstance(error, ShardmillError) and error.traceback:
        say(error.traceback.rstrip())


def _end_of_call(error: Exception) -> int:
    """What typer raises: a wrong call, or an end that is wanted. Anything else is a defect of the program."""
    if type(error).__name__ in ("Abort", "Exit"):
        return int(getattr(error, "exit_code", INTERRUPTED))
    describe = getattr(error, "format_message", None)
    if describe is None:
        return _end_of_work(error)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "shardmill"
    if type(error).__name__ == "NoArgsIsHelpError":
        say(describe())
        return 2
    say(f"{command}: {' '.join(describe().split())} (see {command} --help)")
    return 2


def _end_of_work(error: Exception) -> int:
    from shardmill.client.shipping import CannotShip

    if isinstance(error, CannotShip):
        explain(error)
    elif os.environ.get("SHARDMILL_DEBUG"):
        raise error
    else:
        text = " ".join(str(error).split())
        say(f"shardmill: defect: {type(error).__name__}: {text} (SHARDMILL_DEBUG=1 shows where; please report it)")
    return 1


def _end_as_sigpipe() -> int:
    """The reader of our output has gone: end as any Unix filter does, without a word."""
    # What is left in the buffer must not be tried again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    return 128 + signal.SIGPIPE


if __name__ == "__main__":
    main()
