"""What a run will cost before the hardware is rented: programs compiled for devices that are not here, and what follows from them."""
