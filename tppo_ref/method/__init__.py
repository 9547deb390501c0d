"""The paper's method as pure functions, beside the rules that it is compared with; [P]: read in the authors' public port.
In this order: records, slots, masks, advantages, losses; recurrence (the sums, fast), checks and errors when you need them."""
