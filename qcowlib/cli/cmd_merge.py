# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``merge``: many layers of a chain into one, in one pass.

Invariant: with ``--plan`` nothing is changed or locked.
"""

from __future__ import annotations

from qcowlib.cli import options
from qcowlib.cli.console import Console, Failure
from qcowlib.cli.creation import job_options
from qcowlib.cli.jsonout import pretty
from qcowlib.cli.objects import parse_secrets
from qcowlib.cli.opening import hint_text, references, secret_of
from qcowlib.cli.optlist import OptionList, create_table
from qcowlib.cli.parser import Args, Command, Option
from qcowlib.cli.progress import Progress
from qcowlib.errors import Error, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.cli.jsonout import Json
    from qcowlib.jobs.merge_plan import MergePlan

__all__ = ["COMMAND", "run"]

COMMAND = Command(
    "merge",
    "Merge consecutive layers of a chain into the lowest of them, or into a new image.",
    "TOP",
    (
        options.HELP,
        options.OBJECT,
        options.IMAGE_OPTS,
        options.QUIET,
        options.FORMAT,
        options.CACHE,
        Option("", "from", "lowest", "the lowest layer (default: the last of the chain)", meta="LOWEST"),
        Option("", "to", "highest", "the highest layer (default: TOP)", meta="HIGHEST"),
        Option("", "new", "new", "leave the layers as they are and make this image of them", meta="NEW"),
        options.list_option(text="options of the new image, as for create"),
        Option("d", "", "delete", "delete the merged files at the end"),
        Option("", "plan", "plan", "say what would be done, to the byte; change nothing"),
        options.PROGRESS,
        options.PROGRESS_FORM,
        options.RATE,
        options.OUTPUT_EXTRA,
    ),
    "merge -d --from base.qcow2 --to third.qcow2 top.qcow2",
)


def run(args: Args, console: Console) -> int:
    """Run ``merge``."""
    from qcowlib.jobs.merge import merge, plan_merge

    ref = options.single_image(args)
    as_json = options.wants_json(args)
    cache = options.cache_mode(args)
    secret = secret_of(ref, parse_secrets(args.texts("object")))
    values = OptionList(create_table("qcow2"))
    values.parse(args.texts("options"), console)
    made = job_options(values) if args.texts("options") else {}
    shown = args.flag("progress") and not args.flag("quiet")
    lowest, highest, new = args.text("lowest"), args.text("highest"), args.text("new")
    progress = Progress(console, shown, total=0, form=options.progress_form(args))
    try:
        if args.flag("plan"):
            plan = plan_merge(
                ref.plain_path,
                lowest=lowest,
                highest=highest,
                target=new,
                format=ref.format,
                references=references(),
                secret=secret,
                **made,
            )
            console.out(pretty(_json(plan)) if as_json else _text(plan))
            return 0
        progress.report(0)
        merge(
            ref.plain_path,
            lowest=lowest,
            highest=highest,
            target=new,
            format=ref.format,
            delete=args.flag("delete"),
            references=references(),
            cache=cache,  # type: ignore[arg-type]
            secret=secret,
            progress=progress.within(),
            rate=args.number("rate") or None,
            **made,
        )
    except Error as error:
        raise Failure(str(error), hint=hint_text(error)) from None
    finally:
        progress.end()
    if as_json:
        console.out(pretty({"filename": ref.text, "target": new or lowest, "merged": True}))
    elif not args.flag("quiet"):
        console.out("Layers merged.\n")
    return 0


def _json(plan: MergePlan) -> dict[str, Json]:
    found: dict[str, Json] = {
        "target": plan.target,
        "format": plan.format,
        "new": plan.new,
        "above": plan.above,
        "virtual-size": plan.virtual_size,
        "data": plan.data,
        "zeros": plan.zeros,
        "file-size": plan.file_size,
        "required": plan.required,
        "peak": plan.peak,
        "bitmaps": [{"name": name, "granularity": granularity} for name, granularity in plan.bitmaps],
        "lost-bitmaps": list(plan.lost_bitmaps),
        "merged-files": list(plan.removed),
    }
    found["sources"] = [{**one._asdict(), "bitmaps": list(one.bitmaps)} for one in plan.sources]
    return found


def _text(plan: MergePlan) -> str:
    lines = []
    for one in plan.sources:
        bitmaps = f", bitmaps {' '.join(map(printable, one.bitmaps))}" if one.bitmaps else ""
        lines.append(
            f"{printable(one.path)}: {one.data} bytes in {one.extents} extents ({one.clusters} clusters), "
            f"{one.zeros} bytes of zeros{bitmaps}"
        )
    lines.append(
        f"into {'the new image ' if plan.new else ''}{printable(plan.target)} ({plan.format}, "
        f"{plan.virtual_size} bytes for the guest): {plan.data} bytes are copied"
    )
    lines.append(f"file size {plan.file_size}, required {plan.required}, at most {plan.peak} meanwhile")
    if plan.lost_bitmaps:
        lines.append(f"no room for bitmaps {' '.join(map(printable, plan.lost_bitmaps))}")
    if plan.above is not None:
        lines.append(f"{printable(plan.above)} will stand on it")
    return "\n".join(lines) + "\n"
