"""Copy what a run wrote to results/published/, where the README reads it.

Reads RESULTS_DIR; run by hand after a run that is worth showing. Writes results/published/.

    python -m offline.publish

Then: python -m offline.make_readme_pictures
"""

import shutil

from support import cards, checks, run_files
from support.run_files import ROOT

RESULTS_DIR = "results"
# of captions, after the first (docs/customise.md)
ROUNDS = ("second_round", "third_round", "fourth_round", "fifth_round", "sixth_round")
ROUND = ROUNDS[-1]  # its logs lie in a folder of RESULTS_DIR
FILES = ("run.json", "reward_log.csv", "update_log.csv", "eval_log.csv", f"{ROUND}/lora_log.csv")
CONFUSION = "lora_confusion.csv"  # of the last round, beside the run's own files


def made_by(run):
    """What the published policy's card says beside how to load it: what made it and where its scores are."""
    constants = run["constants"]["ppo_git_with_prompt.py"]
    return f"""
## This run

Seed {constants["SEED"]}, {constants["TOTAL_UPDATES"]} updates of {constants["NUM_ENVS"]} x {constants["NUM_STEPS"]} decisions, {run["seconds"] / 60:.0f} minutes on {run["machine"]}, commit
{run["git_commit"]}; the weights are the running average at the end of the run ([eval_log.csv](../eval_log.csv) has the ones before).
All constants and versions: [run.json](../run.json). Scores over 100 tracks: [validation/](../validation), [held_out/](../held_out), [test/](../test).
"""


def main():
    results, published = ROOT / RESULTS_DIR, ROOT / "results" / "published"
    facts = checks.read_json(results / "policy" / "policy.json", "run the three stages")
    copies = {results / name: published / name for name in FILES}
    copies[results / ROUND / CONFUSION] = published / CONFUSION
    copies[ROOT / facts["adapter"] / "run.json"] = published / ROUND / "lora_run.json"
    missing = [str(source) for source in copies if not source.exists()]
    if missing:
        raise checks.BadInput(f"no {', '.join(missing)}: run the three stages, the second as {ROUND}")
    run, last = checks.read_json(results / "run.json"), run_files.read_log(results / "eval_log.csv")[-1]["update"]
    if int(last) != run["constants"]["ppo_git_with_prompt.py"]["TOTAL_UPDATES"]:
        raise checks.BadInput(f"{results}/ is of a run that ended after update {last}: let it go on with RESUME = True")
    (published / ROUND).mkdir(parents=True, exist_ok=True)
    for source, copy in copies.items():
        shutil.copy2(source, copy)
    shutil.copytree(results / "policy", published / "policy", dirs_exist_ok=True)
    facts["validation"] = None  # of 20 tracks: the hundred are linked
    card = cards.policy_card("results/published/policy", facts) + made_by(run)
    (published / "policy" / "README.md").write_text(card)
    print(f"wrote {published}; next: python -m offline.make_readme_pictures")


if __name__ == "__main__":
    checks.run(main)
