#!lua
-- new: put a batch into the stream and move (uidvalidity, last_uid), in one step. No allow-oom: refused whole when memory is full.
-- KEYS 1 intake hash 2 uidvalidity 3 last_uid 4 last_poll 5 email_count 6 stream 7 index 8 open 9 dlq 10.. processed sets
-- ARGV 1 owner nonce 2 batch id 3 expected uidvalidity 4 expected last_uid ('': state must be absent) 5 new uidvalidity 6 new last_uid
--      7 boundary 8 horizon 9 first_complete 10 passed so far 11 floor 12 time of poll 13 most entries in the stream 14 n,
--      then n x {email_id, member, number of its set from 1, field in open, f, f x (name or value)}
-- A mail whose index entry points to nothing (someone deleted its entry) is added again, and counted once.
-- -> OK live n x (1 added | 0 known) | ALREADY | FENCED owner | STALE uidvalidity last_uid | BACKWARD | FULL live | BADKEY type
--#include stands
local state = redis.call('HMGET', KEYS[1], 'owner', 'batch')
local uidvalidity, last_uid = redis.call('GET', KEYS[2]) or '', redis.call('GET', KEYS[3]) or ''
if state[1] ~= ARGV[1] then return {'FENCED', state[1] or ''} end
if state[2] == ARGV[2] and uidvalidity == ARGV[5] and last_uid == ARGV[6] then return {'ALREADY'} end
if uidvalidity ~= ARGV[3] or last_uid ~= ARGV[4] then return {'STALE', uidvalidity, last_uid} end
if uidvalidity == ARGV[5] and tonumber(ARGV[6]) < tonumber(last_uid) then return {'BACKWARD'} end
local kind = redis.call('TYPE', KEYS[6]).ok
if kind ~= 'stream' and kind ~= 'none' then return {'BADKEY', kind} end

local n, cursor, mails, ids, of_set = tonumber(ARGV[14]), 15, {}, {}, {}
for i = 1, n do
  local set, size = tonumber(ARGV[cursor + 2]), tonumber(ARGV[cursor + 4])
  mails[i] = {id = ARGV[cursor], first = cursor + 5, last = cursor + 4 + size, open = ARGV[cursor + 3]}
  if size > 2000 then return redis.error_reply('ERR a mail of more than 1,000 fields') end
  ids[i] = ARGV[cursor]
  of_set[set] = of_set[set] or {members = {}, mails = {}}
  table.insert(of_set[set].members, ARGV[cursor + 1])
  table.insert(of_set[set].mails, mails[i])
  cursor = cursor + 5 + size
end
if n > 0 then
  local located = redis.call('HMGET', KEYS[7], unpack(ids))
  for i = 1, n do
    mails[i].counted = located[i]
    mails[i].known = located[i] and stands(KEYS[6], KEYS[9], located[i])
  end
  for set, part in pairs(of_set) do
    local done = redis.call('SMISMEMBER', KEYS[9 + set], unpack(part.members))
    for i = 1, #done do part.mails[i].known = part.mails[i].known or done[i] == 1 end
  end
end
local fresh, seen = 0, {}
for i = 1, n do
  mails[i].known = mails[i].known or seen[ids[i]]
  seen[ids[i]] = true
  if not mails[i].known then fresh = fresh + 1 end
end
local live = redis.call('XLEN', KEYS[6])
if fresh > 0 and live >= tonumber(ARGV[13]) then return {'FULL', tostring(live)} end

local answer = {'OK', tostring(live + fresh)}
local index, open = {}, {}
for i = 1, n do
  local mail = mails[i]
  if not mail.known then
    local id = redis.call('XADD', KEYS[6], '*', unpack(ARGV, mail.first, mail.last))
    index[#index + 1] = mail.id
    index[#index + 1] = 'S:' .. id
    if not mail.counted then open[mail.open] = (open[mail.open] or 0) + 1 end
  end
  answer[#answer + 1] = mail.known and '0' or '1'
end
if fresh > 0 then
  redis.call('HSET', KEYS[7], unpack(index))
  for field, count in pairs(open) do redis.call('HINCRBY', KEYS[8], field, count) end
  redis.call('INCRBY', KEYS[5], fresh)
end
redis.call('HSET', KEYS[1], 'batch', ARGV[2], 'boundary', ARGV[7], 'horizon', ARGV[8], 'first_complete', ARGV[9], 'passed', ARGV[10], 'floor', ARGV[11])
redis.call('SET', KEYS[4], ARGV[12])
redis.call('SET', KEYS[2], ARGV[5])
redis.call('SET', KEYS[3], ARGV[6])
return answer
