// The module that Python imports. Loading it registers the operators, which csrc/ defines.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
