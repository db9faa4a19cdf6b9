-- Stores outcomes of recorded calls: this is the checkpoint. position = records before them; the same records again are OK.
-- Returns OK | CANCEL (stored, and stop) | FENCED | MISPLACED (another record stands there: two programs share one fence)
--#include run
local run = live(run_id, fence)
if not run then return 'FENCED' end
local key = k.journal(run_id)
local length = redis.call('LLEN', key)
local answer = run.cancel == '1' and 'CANCEL' or 'OK'
if length > position then
  for i, record in ipairs(records) do
    if redis.call('LINDEX', key, position + i - 1) ~= record then return 'MISPLACED' end
  end
  return answer
end
if length < position then return 'MISPLACED' end
redis.call('RPUSH', key, unpack(records))
if format > run.format then redis.call('HSET', k.run(run_id), 'format', format) end
redis.call('HSET', k.run(run_id), 'steps', position + #records - 1, 'stuck', 0, 'retries', 0, 'usage', usage, 'emit_no', batch_no)
if run.suspicion ~= '' or run.stuck >= 2 then -- whatever it was suspected of, this process has lived on
  redis.call('HDEL', k.run(run_id), 'suspicion')
  redis.call('SREM', k.suspects(run.owner), run_id)
end
append(run, events)
return answer
