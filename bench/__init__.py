"""The benchmark room: what is measured, on which shapes, against whom, how; and the pictures of it.

shapes        named shapes, taken from the models themselves, and sweeps
problems      data, reference and arithmetic of one shape: linear, convolution, masked training, masks, whole networks
providers     implementations to compare: dense torch and ours;  mask_providers: of masks and training
rivals        other people's 2:4 products, and the list of everybody
timing        clocks, interleaved rounds, percentiles, tuning
measure       check, then time: rows of one problem for a list of providers
results       the CSV: one row per measurement;  environment: what every row is stamped with
ceilings      what this device can do at most: copies, dense products, tensor-core instructions
run           the suites from the command line;  campaign, suite: all of them within so many minutes
end_to_end    whole networks: one sampler step, a training step;  sampling: whole sampling
restart       a benchmark whose GPU hangs or is lost, in a new process
advice        `sparsedm bench --model`: would 2:4 make these layers faster on this device?
plot          every picture, from CSV files alone;  targets: what the project wants, beside what was measured
"""
