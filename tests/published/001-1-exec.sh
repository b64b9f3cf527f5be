curl -X POST https://api.zeroboot.dev/v1/exec \
-H 'Content-Type: application/json' \
-H "Authorization: Bearer $ZEROBOOT_API_KEY" \
-d '{"code":"import numpy as np; print(np.random.rand(3))"}'
