"""What carries out a step (`base`): plain torch on one device, or DeepSpeed over ranks (`world`)."""
