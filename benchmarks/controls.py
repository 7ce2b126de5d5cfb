"""What do words add? The same captions, epochs, PPO and tracks without them, three seeds each.

Words and classes have a fourth (`SEEDS = range(4)` for these `ARMS`).

Each run trains all weights of a model on the captions of stage 1, lets it drive, gives it to the default PPO and lets
its policy drive:

- `words` is git-tiny, which reads the texts of stage 2; `random words` its architecture from random weights;
- `classes` is git-tiny's image encoder with a head of five classes in the place of prompt and answers; `random classes`
  the same from random weights;
- `numbers` is git-tiny whose decoder reads the speed and the offset that an instruction asks for as one row, in the
  place of sentence and question, and has a head of five classes;
- `no prior` trains nothing: it is the adapter that ships, with LANGUAGE_PRIOR = 0.

What differs beside the words: `classes` learns the plain answers alone, and in PPO nobody tells it anything, as it
cannot be told anything; it reads the encoder's first row, words and numbers all of its rows through three more layers.
Writes benchmarks/controls/<name>_seed<n>.json as each run ends, and skips those that are there: stop and start at will.
Prints `table()` and draws benchmarks/controls.png, in which `CnnPolicy` (benchmarks/sb3_baseline.py) and the same seeds
of the adapter that ships (benchmarks/seeds.py; only their PPO differs) stand beside them.

    python -m benchmarks.controls      # 13 minutes to two hours a run; after python collect_captions.py
"""

import functools
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import evaluate
import instructions
import ppo_git_with_prompt as ppo
import train_git_lora_carllava_style as stage2
from benchmarks import obedience, runs, seeds
from captions import Collator, draw_texts, draw_told
from fast import git_forward
from GitText2ActionWithPrompt import ANSWERS, GitText2ActionWithPrompt, device
from offline import make_git_tiny
from support import checks, plots, run_files
from support.checkpoints import fingerprint, load_base
from support.plots import plt
from targets import RACE, TARGET_SIZE, Target

BASE = stage2.BASE_MODEL
EPOCHS = 2
BATCH_SIZE = 128
LEARNING_RATE = 5e-4  # peak of a one-cycle schedule
WEIGHT_DECAY = 0.05
SEEDS = range(3)
TRACKS = seeds.TRACKS
ARMS = ("words", "classes", "numbers", "no prior", "random words", "random classes")
IN_WORDS = ("words", "random words")  # of these the captions are taught as texts
TOLD = (*IN_WORDS, "numbers", "no prior")  # these can be told something
OUTPUT = Path(__file__).parent / "controls"
FROM_STAGE_2 = ("__file__", "BASE_MODEL", "REWORDED", "WISHES")  # what a run reads of it


def in_numbers(target):
    """What the arm `numbers` is told in the place of a sentence: "20.0 -3.2"; "" for racing."""
    return "" if target == RACE else f"{target.speed} {target.side}"


def read_numbers(said):
    """The target of `in_numbers`."""
    return Target(*(None if x == "None" else float(x) for x in said.split()))


def draw_in_numbers(rng):
    """An instruction as `instructions.draw` draws it, told in numbers."""
    told = instructions.draw(rng)
    return told._replace(sentence=in_numbers(told.target))


class Classifier(GitText2ActionWithPrompt):
    """An image encoder and a head of five classes, the policy's prior, which cannot be told anything."""

    def __init__(self, git, processor, **head):
        super().__init__(git, processor, {"base_model": BASE, "adapter": ""}, **head)
        self.hidden = nn.Linear(self.feature_size, self.feature_size)
        self.classes = nn.Linear(self.feature_size, len(self.answers))
        self.to(self.device)

    def texts(self, row):
        """What is asked and answered of a caption: pairs of a `Target` and an answer."""
        return [(RACE, row["text"])]

    def classify(self, weights, frames, index, targets):
        """`features` (N, hidden) and logits (N, 5) of the frames `index`, a list of N, under a `Target` for each."""
        seen = git_forward.encode_image(weights, self.pixels(frames))[:, 0].float()
        features = torch.tanh(self.hidden(seen[index]))
        return features, self.classes(features)

    @torch.no_grad()
    def encode(self, frames, told=""):
        each = [told] * len(frames) if isinstance(told, str) else told
        targets = [read_numbers(said) for said in each]
        features, logits = self.classify(self.weights, frames, [*range(len(frames))], targets)
        return features, logits.log_softmax(-1)


class ToldNumbers(Classifier):
    """The whole of git-tiny, whose decoder reads the numbers of a target as one row in the place of a text."""

    def __init__(self, git, processor, **head):
        super().__init__(git, processor, **head)
        self.hidden = nn.Linear(TARGET_SIZE, self.feature_size).to(self.device)

    def texts(self, row):
        told = [(x["instruction"], x["text"]) for x in draw_told(row)]
        said = [(RACE if name == "garbled" else instructions.target(name), answer) for name, answer in told]
        return [(RACE, row["text"]), *said]

    def classify(self, weights, frames, index, targets):
        encoded = torch.stack([torch.from_numpy(target.encode()) for target in targets]).to(self.device)
        cache = git_forward.read_image(weights, self.pixels(frames))
        row = F.layer_norm(self.hidden(encoded), *weights.text_norm)[:, None]
        states, _ = git_forward.decode(weights, row, cache=[(key[index], value[index]) for key, value in cache])
        features = states[:, 0].float()
        return features, self.classes(features)


def classifier_loss(model, samples):
    """Cross-entropy of the answers to what a `Classifier` is asked of some captions."""
    frames, rows = zip(*samples)
    weights = git_forward.collect(model.base, model.processor.image_processor)
    asked = [(i, target, answer) for i, row in enumerate(rows) for target, answer in model.texts(row)]
    index, targets, answers = zip(*asked)
    logits = model.classify(weights, np.stack(frames), [*index], targets)[1]
    labels = torch.tensor([[*ANSWERS].index(answer) for answer in answers], device=model.device)
    return F.cross_entropy(logits, labels)


def fit(parameters, loss_of, data):
    """EPOCHS of AdamW on `loss_of` the batches of `data`."""
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=list)
    optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for epoch in tqdm(range(EPOCHS), unit="epoch"):
        losses = []
        for samples in loader:
            with git_forward.mixed_precision(device()):
                loss = loss_of(samples)
            if not torch.isfinite(loss):
                raise checks.BadInput("the loss is not finite: lower LEARNING_RATE in benchmarks/controls.py")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # as the Trainer of stage 2 does
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        tqdm.write(f"epoch {epoch + 1}: average loss {np.mean(losses):.3f}")


def imitate_in_words(git, processor, data):
    """On the texts of stage 2; returns what `imitate` does."""
    git = git_forward.train_by_this_pass(git, processor.image_processor)
    collate = Collator(processor, functools.partial(draw_texts, reworded=stage2.REWORDED, wishes=stage2.WISHES))

    def loss_of(samples):
        return git(**{key: x.to(device()) for key, x in collate(samples).items()})["loss"]

    fit([*git.parameters()], loss_of, data)
    git.requires_grad_(False)
    return lambda: GitText2ActionWithPrompt(git, processor, {"base_model": BASE, "adapter": ""})


def imitate(arm, data):
    """Train one of ARMS; returns a function that makes its model, frozen, with fresh heads of the policy."""
    if arm == "no prior":
        return functools.partial(GitText2ActionWithPrompt.from_pretrained, ppo.MODEL, language_prior=0.0)
    git, processor = load_base(BASE)
    if arm.startswith("random"):
        git = make_git_tiny.make_model(processor.tokenizer)
    git = git.to(device())
    if arm in IN_WORDS:
        return imitate_in_words(git, processor, data)
    kind = ToldNumbers if arm == "numbers" else Classifier
    model = kind(git, processor)
    trained = [*git.parameters(), *model.hidden.parameters(), *model.classes.parameters()]
    fit(trained, functools.partial(classifier_loss, model), data)
    git.requires_grad_(False)

    def load():
        fresh = kind(git, processor)
        fresh.hidden, fresh.classes = model.hidden, model.classes
        return fresh

    return load


def obeyed(driver, arm):
    """Rows of what is obeyed when it is said, in sentences or in numbers, which have no phrasings."""

    def say(name, group):
        if arm == "numbers":
            return in_numbers(instructions.target(name))
        return obedience.sentences(name, group, len(obedience.TRACKS))

    groups = ("taught", "new") if arm == "numbers" else ("taught", "held_out", "new")
    return obedience.measure_groups(driver, groups, say)


def run(arm, seed):
    """One arm with one seed: how it drives after imitation, over its PPO run and at the end, and what it obeys then."""
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    began, (data, _) = time.time(), stage2.load_data()
    facts = {"arm": arm}
    if arm != "no prior":  # it has seen no captions, and knows nothing before PPO
        hashes = [run_files.file_hash(folder / "train/metadata.jsonl") for folder in stage2.training_folders()]
        facts |= {"captions": len(data), "data_hash": " ".join(hashes)}
        others = [row.get("data_hash") for rows in load_runs().values() for row in rows.values()]
        if {*others} - {None, facts["data_hash"]}:
            raise checks.BadInput(f"the runs in {OUTPUT.name}/ are of other captions: name another OUTPUT")
    load = imitate(arm, data)
    torch.set_num_threads(evaluate.TORCH_THREADS)
    if arm != "no prior":
        facts["before_ppo"] = evaluate.score(evaluate.Policy(load()), TRACKS)
    draw = functools.partial(instructions.draw, share=float(arm in TOLD))
    draw = draw_in_numbers if arm == "numbers" else draw
    measured, driver = runs.run(load, seed, TRACKS, evaluations=ppo.EVALUATIONS, envs={"draw_instruction": draw})
    facts |= measured | ({"obeyed": obeyed(driver, arm)} if arm in TOLD else {})
    facts["constants"] |= run_files.constants_of(*namespaces())
    return facts | {"seconds": round(time.time() - began)}


def namespaces():
    """Whose constants decide a run, beside those that `runs.run` notes."""
    return globals(), {name: getattr(stage2, name) for name in FROM_STAGE_2}


def load_runs():
    """Runs that are there, by arm and seed; those of the adapter that ships under "the adapter that ships"."""
    found = {arm: runs.load(OUTPUT, f"{arm}_") for arm in (*ARMS, "CnnPolicy")}
    found["the adapter that ships"] = {seed: row for seed, row in runs.load(seeds.OUTPUT).items() if seed in SEEDS}
    return {arm: rows for arm, rows in found.items() if rows}


def minus_words(rows, words):
    """Mean difference of the returns from those of the arm `words`, and its interval, over the seeds that both have."""
    both = sorted(rows.keys() & words.keys())
    if rows is words or len(both) < 2:
        return ""
    difference = np.array([np.subtract(rows[seed]["returns"], words[seed]["returns"]) for seed in both])
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(difference.mean(), *seeds.interval(difference))


def table(found):
    """The runs of `load_runs` as a Markdown table."""
    groups = {"taught": "obeyed, taught", "held_out": "other phrasings", "new": "never taught"}
    heads = [
        "arm",
        "imitation alone",
        "after PPO, mean ± std over seeds",
        "each seed",
        "minus words, same seeds (95 %)",
        "laps",
    ]
    heads += groups.values()
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, by_seed in found.items():
        rows = [*by_seed.values()]
        before = [row["before_ppo"]["mean"] for row in rows if "before_ppo" in row]
        means = [row["mean"] for row in rows]
        cells = [arm, f"{np.mean(before):.1f}" if before else ""]
        cells.append(runs.over_seeds(means))
        cells.append(", ".join(f"{mean:.1f}" for mean in means))
        cells.append(minus_words(by_seed, found.get("words", {})))
        cells.append(f"{np.mean([row['laps_finished_percent'] for row in rows]):.0f} %")
        told = [row["obeyed"] for row in rows if "obeyed" in row]
        shares = [[x["obeyed"] for rows_told in told for x in rows_told if x["group"] == group] for group in groups]
        cells += [f"{100 * np.mean(share):.1f} %" if share else "" for share in shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found, path):
    """Return while PPO trains, once whole and once from 650 up.

    Each arm is a line, the mean of its seeds, between the lowest and the highest of them.
    """
    figure, (whole, upper) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for number, (arm, by_seed) in enumerate(found.items()):
        color, rows = f"C{number}", [*by_seed.values()]
        x = [point["frames"] / 1000 for point in rows[0]["curve"]]
        y = np.array([[point["mean"] for point in row["curve"]] for row in rows])
        for axis in (whole, upper):
            axis.plot(x, y.mean(0), "o-", ms=3, color=color, label=f"{arm}, seeds: {len(rows)}")
            axis.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, lw=0)
    for axis in (whole, upper):
        axis.set_xlabel(plots.FRAMES_LABEL)
        axis.grid(alpha=0.3)
    upper.set_ylim(650, 930)
    figure.suptitle("What words add: greedy return on 20 validation tracks")
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncol=4)
    plots.save(figure, path)


def main():
    base = {"base_fingerprint": fingerprint(load_base(BASE)[0])}
    adapter = {"model": GitText2ActionWithPrompt.from_pretrained(ppo.MODEL).source}
    for seed in SEEDS:
        for arm in ARMS:
            path, facts = OUTPUT / f"{arm}_seed{seed}.json", adapter if arm == "no prior" else base
            runs.once(path, functools.partial(run, arm, seed), *namespaces(), **facts)
    found = load_runs()
    print(table(found))
    draw(found, OUTPUT.with_suffix(".png"))


if __name__ == "__main__":
    checks.run(main)
