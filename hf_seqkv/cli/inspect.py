"""`seqkv inspect`: what is here, or in a calibration, without running a model; the table is the output."""

from __future__ import annotations

import argparse
import json

from .options import check_plot, step


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show a calibration, or this environment",
        description="Show what a calibration holds, or what is here, without running a model.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("calibration", nargs="?", metavar="CALIBRATION", help="directory or Hub repository")
    what.add_argument("--env", action="store_true", help="versions, processor, kernel, GPUs, directories")
    parser.add_argument(
        "--step", default=0, type=step, metavar="N", help="of the sequence codec, or a preset's name (0)"
    )
    parser.add_argument("--plot", metavar="FILE", help="write a calibration's spectra and rates, such as spectra.png")
    parser.add_argument("--json", action="store_true", help="print JSON instead, on one line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        CalibrationNotFoundError, FormatError: See `SeqKVCalibration.from_pretrained`.
        ConfigError: It has no such step or preset, or the chart cannot be written there.
    """
    from ..calibration.artifact import SeqKVCalibration
    from ..eval import calibration_report, environment

    if args.env:
        found, report = environment.describe(), environment
    else:
        check_plot(args.plot)
        calibration = SeqKVCalibration.from_pretrained(args.calibration)
        found, report = calibration_report.facts(calibration, args.step), calibration_report
        if args.plot:
            calibration_report.plot(calibration, found, args.plot)
    print(json.dumps(found) if args.json else report.table(found))
    return 0
