"""The configurations that ship with budget-rl: quickstart.yaml and smollm2.yaml, recipes/ (methods), hardware/ (machines).

A package only so that the files travel in the wheel; there is no code here. A file of your own composes any of them with
``defaults: [/quickstart, _self_]`` or ``defaults: [/recipes/grpo@_global_, _self_]``; later entries win, ``_self_`` is this file.
"""
