#include "dnc/momentum.h"
