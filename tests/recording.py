"""An optimizer and a batch for tests."""

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def make_batch(script, old_dist, **fields):
    """A Batch in which old_dist acted, of one minibatch; nothing is in what is not given."""
    actions = fields.get("actions")
    known = dict.fromkeys(script.Batch._fields) | dict(old_dist=old_dist, fewest=1)
    for name in ("obs", "actions", "advantages", "returns", "values", "old_log_probs"):
        known[name] = torch.zeros(len(next(iter(fields.values()))), 0)
    if actions is not None:
        known["old_log_probs"] = old_dist.log_prob(actions).detach()
    return script.Batch(**(known | fields))


class Recorder:
    """Plain gradient ascent, with a learning rate of 0 if need be.

    Keeps the gradient of the objective and the weights after each step, both (P,).
    """

    def __init__(self, module, lr=0.0):
        self.parameters, self.lr = list(module.parameters()), lr
        self.param_groups = [{"params": self.parameters}]
        self.gradients, self.weights = [], []

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.parameters]
        self.gradients.append(-parameters_to_vector(gradients))
        weights = parameters_to_vector(self.parameters).detach() + self.lr * self.gradients[-1]
        vector_to_parameters(weights, self.parameters)
        self.weights.append(weights)
