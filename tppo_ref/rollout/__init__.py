"""How responses come to be: engines that decode, the batcher that fills their slots, and the models that both share."""
