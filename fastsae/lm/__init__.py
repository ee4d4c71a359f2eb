"""Language models: activations harvested from any torch model, dictionaries spliced into it.

token_windows(texts, context, ..)    documents as windows of one length
hook_points(model)                  what can be harvested and spliced, with the modules' classes
harvest(model, tokens, hooks, out)  activations of a model's modules into shards (``fastsae.store``)
splice(model, {module: sae})        a context in which modules give an SAE's reconstruction, edited or not; ``Edit``
evaluate(sae, model, tokens, hook)  reconstruction, sparsity, loss recovered: ``Evaluation``
"""

from fastsae.lm.evaluating import Evaluation, evaluate
from fastsae.lm.harvesting import harvest
from fastsae.lm.hooks import hook_points
from fastsae.lm.splicing import Edit, Spliced, splice
from fastsae.lm.text import token_windows

__all__ = ["Edit", "Evaluation", "Spliced", "evaluate", "harvest", "hook_points", "splice", "token_windows"]
