"""`worldvln-edge eval`: fly and compare; and its subcommands `acceptance` and `card`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from click.core import ParameterSource

from worldvln_edge.command_options import (
    also_option,
    ca_file_option,
    json_option,
    key_file_option,
    own_profiles_option,
    seed_option,
)
from worldvln_edge.training.evaluation.acceptance_cli import acceptance_command
from worldvln_edge.training.evaluation.card_cli import card_command
from worldvln_edge.training.profile_options import own_profiles, profile_option, refuse_without_bundle

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group("eval", invoke_without_command=True, subcommand_metavar="[COMMAND [ARGS]...]")
@click.option("--bundle", type=_FOLDER, help="Fly this bundle in process.")
@click.option("--checkpoint", type=_FOLDER, help="Export this checkpoint to OUT/bundle, and fly that.")
@click.option("--server", metavar="URL", help="Fly through this server.")
@profile_option
@own_profiles_option
@also_option
@click.option(
    "--against",
    metavar="OTHER",
    help="Compare in pairs with a bundle, a checkpoint, a server, or the --out folder of a finished evaluation.",
)
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--count", type=click.IntRange(min=0), default=100, show_default=True, help="Tasks; kinds take turns.")
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="Index of the first task.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes, one per core.")
@seed_option()
@click.option(
    "--baselines/--no-baselines", "with_baselines", default=True, show_default=True, help="Fly what there is to beat."
)
@click.option(
    "--train-flights",
    type=_FOLDER,
    default=Path("runs/flights/train"),
    show_default=True,
    help="Shards of training flights: the baselines are their means.",
)
@click.option(
    "--open-loop",
    "open_loop_flights",
    metavar="DIR",
    type=_FOLDER,
    help="Shards of held-out flights: also measure every stage of --checkpoint on them.",
)
@click.option("--open-loop-limit", type=click.IntRange(min=2), help="Use at most that many of these flights.")
@click.option(
    "--resume/--no-resume",
    "is_resumed",
    default=None,
    help="Keep flights that OUT holds of the same policy.  [default: yes; of servers no, they may have changed]",
)
@click.option("--out", type=_FOLDER, default=Path("runs/eval"), show_default=True, help="For eval.json, .md, .html.")
@key_file_option("the first is sent")
@ca_file_option
@json_option("Print eval.json instead of the tables.")
@click.pass_context
def eval_command(
    context: click.Context,
    bundle: Path | None,
    checkpoint: Path | None,
    server: str | None,
    profile: str | None,
    profile_file: Path | None,
    also: tuple[Path, ...],
    against: str | None,
    split: Literal["validation", "test"],
    count: int,
    first: int,
    workers: int,
    seed: int,
    with_baselines: bool,
    train_flights: Path,
    open_loop_flights: Path | None,
    open_loop_limit: int | None,
    is_resumed: bool | None,
    out: Path,
    key_file: Path | None,
    ca_file: Path | None,
    as_json: bool,
) -> None:
    """Fly held-out tasks and compare with the baselines, task by task.

    Example: worldvln-edge eval --bundle runs/demo/bundle --count 100 --train-flights runs/flights/train
    """
    if context.invoked_subcommand is not None:
        _refuse_own_options(context)
        return
    if sum(choice is not None for choice in (bundle, checkpoint, server)) != 1:
        raise click.UsageError("give one of --bundle DIR, --checkpoint DIR and --server URL")
    refuse_without_bundle(bundle or checkpoint, profile, profile_file, also)
    if ca_file is not None and server is None and "://" not in (against or ""):
        raise click.UsageError("--ca-file says whom to trust behind --server wss://HOST:PORT; give that too")
    if open_loop_flights is not None and checkpoint is None:
        raise click.UsageError("--open-loop looks into the networks, so it needs --checkpoint DIR")
    if open_loop_flights is None and (count == 0 or open_loop_limit is not None):
        raise click.UsageError("--count 0 and --open-loop-limit go with --open-loop DIR")

    import msgspec

    from worldvln_edge.generation_profile import EXACT
    from worldvln_edge.training.evaluation.baselines import read_action_tables
    from worldvln_edge.training.evaluation.eval_run import EvalRunConfig, eval_tasks, run_evaluation, write_open_loop
    from worldvln_edge.training.evaluation.policy_choice import (
        choose_bundle,
        choose_checkpoint,
        choose_other,
        choose_server,
        is_finished,
    )

    report = None
    if checkpoint is not None and open_loop_flights is not None:
        from worldvln_edge.training.evaluation.open_loop import measure_open_loop

        report = measure_open_loop(checkpoint, open_loop_flights, limit=open_loop_limit, seed=seed)
    if report is not None and count == 0:
        run = write_open_loop(report, str(checkpoint), out)
    else:
        key = _first_key(key_file)
        own = own_profiles(profile_file)
        if bundle is not None:
            policy = choose_bundle(bundle, profile=profile or EXACT, profiles=own, also=also)
        elif checkpoint is not None:
            policy = choose_checkpoint(checkpoint, out / "bundle", profile=profile or EXACT, profiles=own, also=also)
        else:
            assert server is not None  # one of the three was given
            policy = choose_server(server, key, ca_file)
        tables = read_action_tables(train_flights) if with_baselines else None
        other = None
        if against is not None:
            other = (
                Path(against)
                if is_finished(against)
                else choose_other(against, out / "against-bundle", key=key, ca_file=ca_file)
            )
        with_rgb_head = False
        if with_baselines and policy.bundle is not None:
            from worldvln_edge.training.evaluation.rgb_replay import has_rgb_head

            with_rgb_head = has_rgb_head(policy.bundle)
        config = EvalRunConfig(
            out=out,
            split=split,
            first=first,
            count=count,
            seed=seed,
            workers=workers,
            is_resumed=is_resumed,
            with_rgb_head=with_rgb_head,
        )
        run = run_evaluation(policy, eval_tasks(config), config, tables=tables, against=other, open_loop=report)
    if as_json:
        click.echo(msgspec.json.encode(run.record).decode())
        return
    click.echo(run.text + "\n\n" + "\n".join(str(path) for path in run.files))


eval_command.add_command(acceptance_command)
eval_command.add_command(card_command)


def _refuse_own_options(context: click.Context) -> None:
    """Options in front of a subcommand would do nothing."""
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        raise click.UsageError(
            f"options of flying do nothing for `eval {context.invoked_subcommand}`; write its own behind its name"
        )


def _first_key(key_file: Path | None) -> str | None:
    if key_file is None:
        return None
    from worldvln_edge.runtime.doors.access import read_key_file

    return read_key_file(key_file)[0]
