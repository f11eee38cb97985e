// The operator that gives kept memory back; see common/pages.h.
#include "common/pages.h"
#include "common/torch_stable.h"

namespace genrec {

STABLE_TORCH_LIBRARY_IMPL(genrec, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&release_kept));
}

}  // namespace genrec
