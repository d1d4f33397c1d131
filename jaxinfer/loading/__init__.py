"""From a folder or Hub id to a module on devices, and the plan before anything is loaded."""
