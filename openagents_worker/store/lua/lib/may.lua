-- may(command, key, by_trying): whether the user may run this command on this key or channel ('' for none). Changes nothing.
-- Redis 7 has a function for this. In Redis 6, the command is tried in a form that changes nothing, or whose result is deleted before the
-- script ends.
local FORMS = {
  HSET = {'f', 'v', 'odd'}, HINCRBY = {'f', 'no number'}, HSETNX = {'f', 'v'}, HDEL = {'f'}, HGET = {'f'}, HMGET = {'f'}, HEXISTS = {'f'}, HSTRLEN = {'f'},
  ZADD = {'XX', '0', 'm'}, ZREM = {'m'}, ZSCORE = {'m'}, ZRANK = {'m'}, ZINCRBY = {'no number', 'm'},
  ZRANGE = {'0', '0'}, ZRANGEBYSCORE = {'0', '0'}, ZREVRANGEBYSCORE = {'0', '0'}, ZCOUNT = {'0', '0'},
  ZREMRANGEBYSCORE = {'1', '0'}, ZREMRANGEBYRANK = {'1', '0'},
  XADD = {'NOMKSTREAM', '*', 'f', 'v'}, XRANGE = {'-', '-'}, XREVRANGE = {'-', '-'}, XTRIM = {'MAXLEN', 'no number'},
  SADD = {'m'}, SREM = {'m'}, SISMEMBER = {'m'}, RPOP = {'no number'}, BRPOP = {'no number'}, RPUSH = {'m'}, LPUSH = {'m'}, LRANGE = {'0', '0'}, LINDEX = {'0'},
  LREM = {'0', 'm'}, LTRIM = {'no number', '0'}, SET = {'v', 'no option'}, PEXPIRE = {'no number'}, EXPIRE = {'no number'}, PUBLISH = {'no message'}}
local NO_KEYS = {'0', '0', '0'} -- Redis reads the number of keys of EVALSHA without checking that the argument exists
local MAKES_A_KEY = {SADD = true, RPUSH = true, LPUSH = true, HSETNX = true}
local CHANGES_ANY_KEY = {DEL = true, UNLINK = true, PERSIST = true} -- these are not tried on a key that exists
local NO_RIGHT = {'^NOPERM', 'ACL failure in script', 'The user executing the script can\'t'}
local NO_COMMAND = {'can\'t run this command', 'has no permissions to run'} -- with any key

local function says(patterns, answer)
  local said = type(answer) == 'table' and answer.err or ''
  for _, pattern in ipairs(patterns) do if string.find(said, pattern) then return true end end
  return false
end

local function is_refused(...) return says(NO_RIGHT, redis.pcall(...)) end

local function may_try(command, key)
  if string.find(command, '|') then return true end -- scripts do not use commands with subcommands
  local made = MAKES_A_KEY[command]
  if (made or CHANGES_ANY_KEY[command]) and redis.pcall('EXISTS', key) ~= 0 then
    return made or not (is_refused('EXISTS', key) or says(NO_COMMAND, redis.pcall(command, key .. ':none')))
  end
  if made and is_refused('PEXPIRE', key, '0') then return true end -- the created key could not be deleted
  local words = {command}
  if key ~= '' then words[2] = key end
  if command == 'RENAME' or command == 'COPY' then words[3] = key end
  for _, word in ipairs(FORMS[command] or {}) do words[#words + 1] = word end
  local refused = is_refused(unpack(words))
  if made then redis.call('PEXPIRE', key, '0') end
  return not refused
end

local function may(command, key, by_trying)
  if by_trying or not redis.acl_check_cmd then return may_try(command, key) end
  local words = {}
  for word in string.gmatch(command, '[^|]+') do words[#words + 1] = word end
  if key ~= '' then words[#words + 1] = key end
  if command == 'RENAME' or command == 'COPY' then words[#words + 1] = key end -- with itself as target, nothing changes
  for _, word in ipairs(FORMS[command] or (key == '' and NO_KEYS or {})) do words[#words + 1] = word end
  return redis.acl_check_cmd(unpack(words))
end
