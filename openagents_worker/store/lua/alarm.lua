-- A worker whose lease was ended early reports that it is alive. The recoveries of its runs decrease again. A repeated report has no effect.
-- The suspicion of its runs is removed later, when the process registers again.
-- The third false alarm within an hour switches the check that was wrong off for an hour.
-- Returns `FalseAlarm`, or nil if the lease was not ended early. Event worker.false_alarm for each run that has not ended.
--#include run
--#include early
local HOUR_MS, TOO_MANY = 3600000, 3
local by = redis.call('HGET', k.gone(incarnation), '')
if not by or by == FALSE_ALARM then return false end
redis.call('PERSIST', k.workers()) -- no effect, but Redis allows it when its memory is full, and then allows the other writes
local taken = redis.call('HGETALL', k.gone(incarnation))
redis.call('HSET', k.gone(incarnation), '', FALSE_ALARM) -- reclaim does not count recoveries of this worker from now on
local runs = 0
for i = 1, #taken, 2 do
  local run = taken[i] ~= '' and load(taken[i])
  if run and run.life == tonumber(taken[i + 1]) then
    runs = runs + 1
    redis.call('HSET', k.run(run.id), 'recoveries', digits(math.max(run.recoveries - 1, 0)))
    if not TERMINAL[run.state] then append(run, {'worker.false_alarm', '{"alive":' .. q(incarnation) .. ',"seen_by":' .. q(by) .. '}'}) end
  end
end
local alarms = k.false_alarms(by)
redis.call('ZADD', alarms, digits(NOW_MS), incarnation)
redis.call('ZREMRANGEBYSCORE', alarms, '-inf', digits(NOW_MS - HOUR_MS))
redis.call('PEXPIRE', alarms, HOUR_MS)
local off = redis.call('ZCARD', alarms) >= TOO_MANY
if off then redis.call('SET', k.looks_off(by), '1', 'PX', HOUR_MS) end
return reply{runs = runs, seen_by = by, off = off}
