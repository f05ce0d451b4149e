"""Built-in tasks: `digits` (in scikit-learn), image folders and CIFAR-10's own layout on disk."""
