"""One PPO update on a stored rollout, alone or as a process of torchrun: `toy_update.py BASE ROLLOUT OUTPUT`.

Of several processes each takes its share of every minibatch; the first one writes what came out.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ppo_git_with_prompt as ppo  # noqa: E402

UNION_MINIBATCH = 16


def main(base, rollout, output):
    accelerator = Accelerator(cpu=True)
    count, index = accelerator.num_processes, accelerator.process_index
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = ppo.model_file.GitText2ActionWithPrompt.from_pretrained(base)
    stored = torch.load(rollout, weights_only=True)
    mine = {key: torch.cat([part.chunk(count)[index] for part in x.split(UNION_MINIBATCH)])
            for key, x in stored["batch"].items()}  # fmt: skip
    ppo.MINIBATCH_SIZE = UNION_MINIBATCH // count
    torch.randperm = torch.arange  # the minibatches in the order of the file
    heads = [*model.policy_head.parameters(), *model.value_head.parameters()]
    optimizer = torch.optim.Adam(heads, lr=1e-3, eps=1e-5)
    for warming_up in (True, False):
        diagnostics = ppo.update_policy(model, optimizer, mine, warming_up, accelerator)
        with torch.no_grad():  # the next update's rollout: the same decisions by the policy as it is now
            logits = model.head(mine["features"], mine["answer_log_probs"], mine["dropout"])[0].log_softmax(-1)
            mine["log_prob"] = logits.gather(1, mine["action"][:, None])[:, 0]
    normalizer = ppo.ReturnNormalizer(stored["reward"].shape[1], 0.98)
    reward, done = (stored[key].chunk(count, 1)[index] for key in ("reward", "done"))
    normalized = accelerator.gather(ppo.normalize_rewards(normalizer, reward, done, accelerator).T.contiguous()).T
    if accelerator.is_main_process:
        torch.save(
            {"parameters": [p.detach() for p in heads], "diagnostics": diagnostics, "reward": normalized}, output
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
