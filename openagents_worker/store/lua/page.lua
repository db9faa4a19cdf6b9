-- Reads a page of the journal of a run: the records from `position` on, as many as fit into `page_bytes`, at least one. Returns records
--#include journal
local key = k.journal(run_id)
return records(key, position, redis.call('LLEN', key), page_bytes, 1)
