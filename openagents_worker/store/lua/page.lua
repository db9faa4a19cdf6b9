-- A page of a run's journal: the records from `position` on, as many as fit into `page_bytes`, and one at least. Returns records
--#include journal
local key = k.journal(run_id)
return records(key, position, redis.call('LLEN', key), page_bytes, 1)
