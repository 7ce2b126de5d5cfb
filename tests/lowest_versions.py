"""The suite with the lowest versions that requirements.txt allows, not part of the default run. The highest are what a
fresh installation, and so every other run of the suite, has. Writes tests/lowest_versions.json if it passes.

    python tests/lowest_versions.py [pytest's arguments]
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
        facts = "import json, run_files; print(json.dumps(run_files.run_facts()))"
        facts = subprocess.run([python, "-c", facts], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout
    row = {"result": result.stdout.strip().splitlines()[-1], "arguments": sys.argv[1:], "pins": pins}
    OUTPUT.write_text(json.dumps(row | json.loads(facts.splitlines()[-1]), indent=1) + "\n")


if __name__ == "__main__":
    main()
