"""Distribution matching distillation: rollout, scores and the losses of generator and critic."""
