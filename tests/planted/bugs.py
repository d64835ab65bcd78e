"""All bugs."""

from planted import in_config, in_data, in_loop, in_model, in_my_model, in_step

BUGS = [*in_config.BUGS, *in_data.BUGS, *in_model.BUGS, *in_my_model.BUGS, *in_step.BUGS, *in_loop.BUGS]
