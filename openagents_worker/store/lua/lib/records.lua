--#include time
-- Reading values that may be invalid: one broken record must not affect other runs.

-- needs(key, kind): unless the key has this type or does not exist, the script ends with an error that names the key
local function needs(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then aside().fail(key) end
end

-- decoded(text): the decoded JSON; nil if it is not a JSON object or list
local function decoded(text)
  local ok, value = pcall(cjson.decode, text)
  return ok and type(value) == 'table' and value or nil
end

local function whole(text)
  local number = tonumber(text) or 0
  return number > -2 ^ 53 and number < 2 ^ 53 and number or 0
end

-- field_of(R, name): a field of the record of a run; nil also if the key has a wrong type
local function field_of(R, name)
  local value = redis.pcall('HGET', k.run(R), name)
  return type(value) == 'string' and value or nil
end

-- is_known(R): whether the run has a record
local function is_known(R) return field_of(R, 'state') ~= nil end

-- journal_length(R): the number of its journal records; 0 also if the key has a wrong type: `claim` ends such a run
local function journal_length(R)
  local length = redis.pcall('LLEN', k.journal(R))
  return type(length) == 'number' and length or 0
end

-- count_up(key, field, by): increases a counter by `by` (default 1); a value that is not a number counts as 0. If Redis refuses the write, such as
-- with OOM, the script ends with this error: a Redis that is full lets a script delete the counter, and lets it write everything after that
local function count_up(key, field, by)
  local counted = redis.pcall('HINCRBY', key, field, by or 1)
  if type(counted) == 'number' then return counted end
  local value = redis.pcall('HGET', key, field)
  if type(value) == 'string' and (#value > 15 or not string.find(value, '^-?%d+$')) then redis.call('HDEL', key, field) end
  return redis.call('HINCRBY', key, field, by or 1)
end
