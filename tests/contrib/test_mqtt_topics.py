"""Which subscriptions bring each message of topics that overlap once. Without a broker."""

import random

import pytest
from paho.mqtt.client import topic_matches_sub
from processes import SEED

from minibatch.contrib.mqtt.topics import subscriptions
from minibatch.errors import ArgumentError


@pytest.mark.parametrize(('topics', 'subscribed'), [
    (['a', 'b'], ['a', 'b']),
    (['a', 'a'], ['a']),
    (['plant/#', 'plant/+/alarm'], ['plant/#']),
    (['plant/+/alarm', 'other', 'plant/#'], ['other', 'plant/#']),
    (['a/+', '+/b'], ['+/+']),
    (['a/#', 'a'], ['a/#']),
    (['a', 'a/+'], ['a', 'a/+']),
    (['a/b', 'a/b/#', 'c/+'], ['a/b/#', 'c/+']),
    (['a/+/c', 'a/b/#'], ['a/+/#']),
    (['a/b', 'c/d', '+/#'], ['+/#']),
    (['#', '$SYS/#'], ['#', '$SYS/#']),
    (['$share/g/a/#', '$share/g/a/b'], ['$share/g/a/#']),
    (['$share', '$share/x'], ['$share', '$share/x']),
], ids=str)  # fmt: skip
def test_topics_that_overlap_are_subscribed_as_the_narrowest_that_covers_them(topics, subscribed):
    assert [each.topic for each in subscriptions(topics)] == subscribed


@pytest.mark.parametrize('topics', [['a/#', '$share/g/a/b'], ['$share/g/+', '$share/h/a']])
def test_what_is_shared_by_others_may_not_overlap(topics):
    with pytest.raises(ArgumentError, match=r'topic has .* overlap'):
        subscriptions(topics)


def test_a_message_comes_for_one_subscription_and_is_superfluous_only_if_no_topic_matches_it():
    rng = random.Random(SEED)

    def levels(words):
        return [rng.choice(words) for _ in range(rng.randint(1, 4))]

    for _ in range(2000):
        wanted = ['/'.join(levels('ab++') + rng.choice([[], ['#']])) for _ in range(rng.randint(1, 4))]
        topic = '/'.join(levels(['a', 'b', '', '$x']))
        found = subscriptions(wanted)
        came = [each for each in found if topic_matches_sub(each.topic, topic)]
        is_wanted = any(topic_matches_sub(each, topic) for each in wanted)
        assert len(came) <= 1, (SEED, wanted, topic)
        assert not is_wanted or len(came) == 1, (SEED, wanted, topic)
        assert [each.is_superfluous(topic) for each in came] == [not is_wanted] * len(came), (SEED, wanted, topic)
