"""The suite with the lowest versions that requirements.txt allows: not part of the default run, its last result is in
lowest_versions.json. The highest are what a fresh installation, and so every other run of the suite, has.

    python tests/lowest_versions.py [pytest's arguments]      # 12 minutes on two CPU cores
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import collect_captions  # noqa: E402

OUTPUT = ROOT / "tests" / "lowest_versions.json"


def lowest(requirements):
    """`name==version` for each line `name==version` or `name>=version...`."""
    pins = []
    for line in requirements.splitlines():
        if line and not line.startswith("#"):
            name, version = re.match(r"([\w\[\]-]+)[>=]=([\w.]+)", line).groups()
            pins.append(f"{name}=={version}")
    return pins


def main():
    pins = lowest((ROOT / "requirements.txt").read_text())
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        torch = next(pin for pin in pins if pin.startswith("torch=="))
        subprocess.run([*pip, torch], check=True)
        # newer pyarrow, which only the test of CarRacing-Data needs, wants a newer numpy
        subprocess.run([*pip, *pins, "pytest", "hypothesis", "datasets", "pyarrow<20"], check=True)
        result = subprocess.run(
            [python, "-m", "pytest", "-q", *sys.argv[1:]],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    print(result.stdout[-5000:])
    if result.returncode:
        raise SystemExit(result.returncode)
    facts = {"pins": pins, "result": result.stdout.strip().splitlines()[-1], "arguments": sys.argv[1:]}
    OUTPUT.write_text(json.dumps(facts | collect_captions.run_facts(), indent=1) + "\n")


if __name__ == "__main__":
    main()
