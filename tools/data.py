"""Look at prepared data sets.

python tools/data.py ls FOLDER ...            one line per set in or below the folders
python tools/data.py verify FOLDER            read every row, check hashes, shapes and numbers
python tools/data.py stats FOLDER             buckets, tokens, latents, what was left out
python tools/data.py show FOLDER [out=sheet.png] [split=train] [count=24]     a contact sheet with captions
python tools/data.py merge OUT FOLDER FOLDER ...    one set of several that were made alike
"""

import sys
from pathlib import Path

from data_pipeline.description import load_description
from data_pipeline.inspection import contact_sheet, find_sets, list_line, measure, merge, verify
from data_pipeline.progress import Progress


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(__doc__.strip())
        return 0 if arguments else 2
    try:
        return run(arguments[0], [a for a in arguments[1:] if "=" not in a], options(arguments[1:]))
    except (ValueError, OSError) as error:
        print(f"data: {error}", file=sys.stderr)
        return 2


def options(arguments: list[str]) -> dict[str, str]:
    known = {"out": "sheet.png", "split": "", "count": "24"}
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for name in given:
        if name not in known:
            raise ValueError(f"Unknown option {name!r}. Options of show: {', '.join(known)}.")
    return known | given


def run(verb: str, folders: list[str], given: dict[str, str]) -> int:
    if verb not in ("ls", "verify", "stats", "show", "merge"):
        raise ValueError(f"{verb!r} is not known. Choose one of: ls, verify, stats, show, merge.")
    if len(folders) < (3 if verb == "merge" else 1):
        raise ValueError("merge needs OUT and two or more sets." if verb == "merge" else f"{verb} needs a folder.")
    if verb == "ls":
        for folder in folders:
            print(*map(list_line, find_sets(Path(folder))), sep="\n")
        return 0
    if verb == "merge":
        print(list_line(merge(Path(folders[0]).absolute(), [load_description(folder) for folder in folders[1:]])))
        return 0
    description = load_description(folders[0])
    match verb:
        case "verify":
            with Progress() as progress, progress.stage("verifying", sum(description.splits.values())) as advance:
                problems = verify(description, advance)
            print(*problems, sep="\n") if problems else print(f"{description.root}: whole.")
            return 1 if problems else 0
        case "stats":
            print(list_line(description), *measure(description).lines(description), sep="\n")
        case "show":
            if not given["count"].isdigit() or int(given["count"]) < 1:
                raise ValueError(f"count={given['count']} must be a number of samples.")
            split = given["split"] or next(iter(description.splits))
            contact_sheet(description, split, int(given["count"])).save(given["out"])
            print(given["out"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
