"""One HTML page of a run, or of two beside each other, from what the artifacts hold. Needs no torch.

records        the folders of a run, read: manifests, configs, metrics; unfinished stages too
layout         the graph of the stages, laid out
curves         which metrics belong into one panel
drawing        a panel as SVG (matplotlib), its colours the page's
results, noise the table of every model over every task, and which differences are larger than noise
reliability    whether the reward model is as often right as it claims
answers        what the models answer to the same prompts
variants       means over seeds and differences of variants
differences    what stages of one kind are told differently
recipe_of      the recipe that the manifests stand for
page, compare  all of it as one file
"""
