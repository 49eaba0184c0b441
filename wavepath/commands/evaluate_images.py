"""The image modes of `wavepath evaluate`: super-resolution, virtual staining and its encoders; flags and help are in `commands.evaluate`."""

import argparse


def run_superres(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.errors import ConfigError
    from wavepath.evaluation.superres import evaluate_superres
    from wavepath.evaluation.superres_report import text_table

    if args.positive and not args.classifier:
        raise ConfigError("--positive names a class of --classifier; give one, or leave it out")
    if args.classifier:
        from wavepath.evaluation.diagnosis import diagnose, read_classifier

        read_classifier(args.classifier, args.positive)  # refused now rather than after the crops
    given = options(args, "max_images", "tile", "overlap")
    results = evaluate_superres(args.superres, args.out, data=args.data, lpips=tuple(args.lpips or ()), seed=args.seed, **given)
    print(text_table(results))
    rows = [
        ("test crops", f"{results['images']} of {results['groups']} slides, {results['scale']}x"),
        ("metrics", f"RGB without border crop; Y with {results['shave']} px cut at each border; 8-bit images"),
        ("LPIPS", "weights not given (--lpips)" if results["lpips"] == "not given" else ", ".join(results["lpips"])),
    ]
    if args.classifier:
        from wavepath.evaluation.evaluate import text_table as probes_table

        found = diagnose(
            args.classifier, args.superres, args.out / "diagnosis", data=args.data, positive=args.positive, seed=args.seed, **given
        )
        print(probes_table(found))
        rows.append(("diagnosis", f"{found['tiles']} held-out images of {found['groups']} cases, {args.out / 'diagnosis' / 'results.md'}"))
    summary("evaluated", [*rows, ("picture", args.out / "comparison.png"), ("results", args.out / "results.md")])
    return 0


def run_stain(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.stain import evaluate_stain
    from wavepath.evaluation.stain_report import protocol, registered, text_table

    given = options(args, "max_images", "tile", "overlap", "protocol", "inception", "features_of")
    results = evaluate_stain(args.stain, args.out, data=args.data, seed=args.seed, **given)
    print(text_table(results))
    rows = [
        ("test pairs", f"{results['images']} of {results['groups']} slides"),
        ("protocol", protocol(results)),
        ("registration", registered(results)),
        ("pictures", f"{args.out / 'comparison.png'}, {args.out / 'scatter.png'}"),
        ("results", args.out / "results.md"),
    ]
    summary("evaluated", rows)
    return 0


def run_stain_encoders(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.stain_encoders import evaluate_encoders
    from wavepath.evaluation.stain_encoders_report import text_table

    results = evaluate_encoders(args.stain_encoders, args.out, data=args.data, seed=args.seed, **options(args, "max_images"))
    print(text_table(results))
    windows = f"{results['windows']} of {results['side']} px in {results['images']} pairs of {results['groups']} slides"
    summary("evaluated", [("test windows", windows), ("picture", args.out / "encoders.png"), ("results", args.out / "results.md")])
    return 0


def options(args: argparse.Namespace, *names: str) -> dict:
    """Those that were given; the others have their defaults where they are used."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
