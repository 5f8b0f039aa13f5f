from hrm_megatron.parallel.cpu import activate

activate()
