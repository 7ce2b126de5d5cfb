"""PPO functions (being built)."""

import torch


def compute_gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    Every argument is a float32 tensor (T, N) but `gamma` and `gae_lambda`. `next_value[t]` is the value of the state
    that followed step t, before any reset; `terminated` marks real ends, which are worth nothing afterwards; `done`
    marks every episode end, truncation included, where the sum stops but the value is still bootstrapped.

    Returns advantage and return (advantage + value), each (T, N).
    """
    advantage = torch.zeros_like(reward)
    running = torch.zeros_like(reward[0])
    delta = reward + gamma * next_value * (1 - terminated) - value
    for t in reversed(range(len(reward))):
        running = delta[t] + gamma * gae_lambda * (1 - done[t]) * running
        advantage[t] = running
    return advantage, advantage + value


def ppo_loss(logits, value, action, old_log_prob, advantage, returns, clip, entropy_coef, value_coef):
    """The clipped surrogate objective (Schulman et al. 2017, arXiv 1707.06347, eq. 7 and 9).

    `logits` float32 (B, A), `action` int64 (B,), the others float32 (B,); `advantage` is used as given.
    Returns the scalar loss and a dict of detached diagnostics under their usual names.
    """
    log_probs = logits.log_softmax(-1)
    log_ratio = log_probs.gather(1, action[:, None])[:, 0] - old_log_prob
    ratio = log_ratio.exp()
    policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    value_loss = 0.5 * (value - returns).square().mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    loss = policy_loss - entropy_coef * entropy + value_coef * value_loss
    with torch.no_grad():
        diagnostics = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "approx_kl": (ratio - 1 - log_ratio).mean(),  # Schulman, "Approximating KL divergence", k3
            "clipfrac": ((ratio - 1).abs() > clip).float().mean(),
        }
    return loss, diagnostics


class ReturnNormalizer:
    """Divide rewards by the running standard deviation of the discounted return, as Gymnasium's `NormalizeReward`.

    No mean is subtracted: the sign of a reward stays. The statistics belong in the checkpoint (`state_dict`).
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.discounted = torch.zeros(num_envs, dtype=torch.float64)
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, reward, terminated):
        """Normalise one step's rewards, float32 (N,); `terminated` (N,) restarts the discounted return."""
        self.discounted = self.discounted * self.gamma * (1 - terminated.double()) + reward.double()
        batch_mean, batch_var = self.discounted.mean().item(), self.discounted.var(unbiased=False).item()
        batch_count = len(reward)
        delta, total = batch_mean - self.mean, self.count + batch_count
        m2 = self.var * self.count + batch_var * batch_count + delta**2 * self.count * batch_count / total
        self.mean, self.var, self.count = self.mean + delta * batch_count / total, m2 / total, total
        return reward / (self.var + 1e-8) ** 0.5

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


def explained_variance(value, returns):
    """1 - Var(returns - value) / Var(returns): 1 is perfect, 0 as good as the mean."""
    return (1 - (returns - value).var() / (returns.var() + 1e-8)).item()
