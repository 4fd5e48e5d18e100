"""How requests are served: tokens, pages, the schedule, sampling. No bytes of tensors here."""
