"""Training a slimmable network with in-place distillation: its narrower selves learn from the widest one.

The loop is used as it is. The network divides its own batches by the sandwich rule (`models/slimmable.py`), so each
width sees images, times and noise of its own, the gradients of all add up, and one step is taken: `loop.train` and
`run_chain` train a supernet like any other network. All that is left to say here is who teaches: `train_supernet`, or
in a chain a stage with teacher="widest".
"""

from torch import nn

from sparsedm.diffusion import evaluating
from sparsedm.errors import InputError
from sparsedm.train.loop import train


class WidestTeacher(nn.Module):
    """A slimmable network at its full width, as it is now, for the transfer loss (arXiv 1903.05134, section 3.3).

    For the images that the widest one itself was shown, the target is its own prediction and the loss is 0.
    """

    def __init__(self, model):
        super().__init__()
        self.others = (model,)  # in a tuple, so that it is no sub-module: a loop freezes the parameters of its teacher

    def forward(self, x, t, y=None):
        (model,) = self.others
        with evaluating(model), model.at_width(8):
            return model(x, t, y)


def check_supernet(model, batch_size):
    """Raise InputError for a network that trains one width only, or a batch that cannot be divided among its widths."""
    passes = getattr(getattr(model, "config", None), "passes", 0)
    if not passes:
        raise InputError("a supernet is a slimmable network with passes of at least 2, and this one trains one width")
    if batch_size < passes:
        raise InputError(f"batch_size={batch_size} cannot be divided among {passes} widths")


def train_supernet(model, images, schedule, options, folder, *, distill=0.0, **settings):
    """`loop.train` for a SlimmableDDPM. distill: weight of the transfer loss from the widest; settings: see there.

    Raises, beside what `train` raises, what `check_supernet` does.
    """
    check_supernet(model, options.batch_size)
    teacher = {"teacher": WidestTeacher(model), "w_kd": distill} if distill else {}
    return train(model, images, schedule, options, folder, **teacher, **settings)
