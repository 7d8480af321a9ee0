"""The page of a run: ``write_report(folder)`` turns the JSON of a run into one self-contained ``report.html``.

Charts are SVG of our own (``charts.py`` and a template), some kilobytes each; a plotting library would be megabytes.
Only ``result.json`` must be there, and of it only "model"; a part of the page whose numbers are missing is left out.
Read are, where they exist:

``result.json``, one object. Accuracies are fractions (0 to 1), [b, a] are the numbers before and after conversion:

==================  ==================================================================================================
model, data         names
command             what makes the result again
seconds             of the whole run
normal, separable   {conv_params, params, macs, accuracy, metrics: {name: number} of the user's own function,
                    latency_ms: {contender: number}, latency_batch, threads, kernels: {op: name}}; one of them alone,
                    for example after a training, is shown without comparison
task                "classes", or "outputs": accuracies are replaced by errors of the outputs to the original's
stages              [{name, accuracy or error, seconds}], "original" first where there are accuracies
closeness           {relative_error, outputs: [{name, relative_error, psnr, agreement}]}, of the task "outputs"
held_out_images     of how many images, held out from conversion and distillation, the accuracies of the stages
                    are; 0 where of all training images, which were too few; without it they are of the test images
notes               sentences to go with them
layers              [{name, kind ("separable", or "normal" where it was left), kernel [kH, kW], in_channels,
                    out_channels, rank (M or R), error_closed_form and error (shares of the variance), params: [b, a],
                    macs: [b, a], bytes: [b, a], ms: [b, a], reason}]
other_ms            [b, a]: time of everything that belongs to no layer
precisions          [{network, precision, ms of one call, bytes of the weights, accuracy or error, reason}]
curves              rows of the training log {epoch, phase, train_loss, train_accuracy, test_accuracy, ...}; every
                    number whose name ends with "loss", "accuracy" or "error" is a curve, for each "phase" one
classes             names
confusion           {normal, separable}: matrices of counts, rows are labels, columns are predictions
confusion_classes   numbers of the classes that the matrices have, where they do not have all
test_images         how many images the accuracies and disagreements are of
disagreement_count  how many of them the networks answer differently
disagreements       [{image: "data:image/png;base64,...", name, label, normal, separable}], labels as class numbers
machine, versions   {name: value}
==================  ==================================================================================================

``explanation.json``: what ``sepconv.runs.layer_data.collect`` returns. ``live.json``: networks that the page runs in
the browser: ``networks``, [{name, precision, symbol (what its functions begin with), wasm (base64 of a module of
``sepconv.export_c``), pixels and classes (how many)}]; ``input`` {channels, size, resize, interpolation, squash};
``classes`` (names); ``ink`` of drawings, {dark, share of the side} or null; ``example`` {pixels (base64 of bytes),
label}. ``log.jsonl``: rows of curves, used if result.json has none. Any other ``*.json`` with a list "records":
benchmark records {suite, case, contender, pass, threads, layout, median_ms, low_ms, high_ms, macs, bytes, kernel}; its
"machine", or the result's, gives the limits of the roofline: {fma_peak_gflops, memory_gb_per_s}, each {thread count:
number}, or a number: of one core, and of all.

A folder without result.json but with such benchmark files gets a page of those; one such file alone, too.
"""

from sepconv.report.page import page_of as page_of
from sepconv.report.page import write_report as write_report
